#!/usr/bin/env bash
# brainenc on several nodes of a Slurm cluster: one Ray node a Slurm node, the driver on the first.
#
#   sbatch --gpus-per-node=4 deploy/slurm.sh extract --subject-dir $DATA/subj01 --store $WORK/store --backbone facebook/dinov2-base --feature 11.q
#   sbatch --gpus-per-node=4 deploy/slurm.sh train --resume $WORK/run1
#
# Everything after the script's name is a brainenc command; for those that work on a cluster (extract, plan, train)
# Ray is started on all nodes, and its address added. Any other runs on the first node alone: give it --nodes=1.
#
# --gpus-per-node has no default below, because its spelling is the site's (--gpus-per-node=a100:4, or --gres=gpu:4):
# Ray is told as many GPUs as Slurm gave each node, and without the option that is none, --exclusive or not. All nodes
# must have the same number; Slurm tells the script that of the first.
#
# BRAINENC_ENV is the folder of the virtual environment (default: .venv beside this repository). JOIN_S is how many
# seconds the nodes have for joining (120). DRY_RUN=1 prints what would run.
#
#SBATCH --job-name=brainenc
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --output=brainenc-%j.log
# Two minutes before the time is up, SIGTERM to this script (B:), which passes it to the driver: emergency checkpoint,
# exit 75, and the job puts itself back into the queue.
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
# What Slurm writes must be appended to: a requeued job goes on in the same log.
#SBATCH --open-mode=append

set -euo pipefail

if [ $# -eq 0 ]; then
  echo "usage: sbatch $0 COMMAND [OPTION ...]   (a brainenc command: extract, train ...)" >&2
  exit 2
fi

root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}
env=${BRAINENC_ENV:-$root/.venv}
port=${RAY_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 20000))} # jobs of two people may share a node of the same cluster
cpus=${SLURM_CPUS_ON_NODE:-$(nproc)}
gpus=${SLURM_GPUS_ON_NODE:-0}
# `start ... &` becomes the program itself (exec): a signal sent to $! must reach it, not a shell around it.
start() { if [ "${DRY_RUN:-}" = 1 ]; then echo "+ $*"; else exec "$@"; fi; }
run() { if [ "${DRY_RUN:-}" = 1 ]; then echo "+ $*"; else "$@"; fi; }

# What Ray knows of the cluster, in a process that ends at once; nothing while the head does not answer.
count='
import socket, sys
from ray._raylet import GcsClient

host, _, port = sys.argv[1].rpartition(":")
socket.create_connection((host, int(port)), timeout=2).close()  # GcsClient itself would try for a minute
print(sum(node.state == 0 for node in GcsClient(address=sys.argv[1]).get_all_node_info().values()))
'
# Until so many nodes have joined: work that begins before would be planned for those that are there.
wait_for_nodes() {
  if [ "${DRY_RUN:-}" = 1 ]; then echo "+ wait until $1 node(s) have joined"; return; fi
  local deadline=$((SECONDS + ${JOIN_S:-120})) found=0
  while true; do
    found=$("$env/bin/python" -c "$count" "$head_ip:$port" 2>/dev/null) || found=0
    if [ "$found" -ge "$1" ]; then return; fi
    for pid in "${pids[@]}"; do
      if ! kill -0 "$pid" 2>/dev/null; then echo "brainenc: Ray ended on a node before $1 had joined; see above" >&2; exit 1; fi
    done
    if [ "$SECONDS" -ge "$deadline" ]; then
      echo "brainenc: $found of $1 nodes have joined after ${JOIN_S:-120} s (JOIN_S); see above for what Ray says" >&2
      exit 1
    fi
    sleep 1
  done
}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname --ip-address | awk '{print $1}')

# Ray looks at the memory of the whole machine and not at what Slurm gave us, so it is told; and one token for all nodes
# of this job, so that nobody else on the network can hand it work.
export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token MALLOC_ARENA_MAX=1
export RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')}
export RAY_JOB_STOP_WAIT_TIME_S=60
memory=$(( ${SLURM_MEM_PER_NODE:-0} * 1024 * 1024 ))
limits=(--num-cpus="$cpus" --num-gpus="$gpus" --object-store-memory=1000000000 --disable-usage-stats)
if [ "$memory" -gt 2000000000 ]; then limits+=(--memory="$((memory - 2000000000))"); fi
scratch=/tmp/ray-${SLURM_JOB_ID:-local}

pids=()
stop_ray() {
  # A dry run only prints, in the background too: it is waited for, not killed.
  if [ "${DRY_RUN:-}" != 1 ]; then
    for pid in "${pids[@]:-}"; do [ -n "$pid" ] && kill "$pid" 2>/dev/null || true; done
  fi
  wait 2>/dev/null || true
  run srun --ntasks-per-node=1 rm -rf "$scratch" || true
}
trap stop_ray EXIT

start_cluster() {
  start srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" \
    "$env/bin/ray" start --head --node-ip-address="$head_ip" --port="$port" --include-dashboard=false \
    --temp-dir="$scratch" "${limits[@]}" --block &
  pids+=($!)
  wait_for_nodes 1
  for node in "${nodes[@]:1}"; do
    start srun --nodes=1 --ntasks=1 --nodelist="$node" \
      "$env/bin/ray" start --address="$head_ip:$port" "${limits[@]}" --block &
    pids+=($!)
  done
  wait_for_nodes "${#nodes[@]}"
}

command=("$@")
case $1 in
  extract | plan | train)
    start_cluster
    command+=(--address "$head_ip:$port")
    ;;
  *) ;; # works without Ray, and would refuse an --address
esac
# The driver runs in the background, because a shell that waits for a foreground command hears no signal.
start "$env/bin/brainenc" "${command[@]}" &
driver=$!
trap 'echo "brainenc: Slurm gives notice; asking for an emergency checkpoint"; kill -TERM $driver' TERM
code=0
wait "$driver" || code=$?
while kill -0 "$driver" 2>/dev/null; do # `wait` came back for the signal, not for the end
  code=0
  wait "$driver" || code=$?
done

if [ "$code" -eq 75 ]; then # stopped safely: the same command goes on
  echo "brainenc: stopped safely; requeueing job ${SLURM_JOB_ID:-}"
  run scontrol requeue "${SLURM_JOB_ID:-}"
fi
exit "$code"
