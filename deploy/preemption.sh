#!/usr/bin/env bash
# Tells Ray when Google takes this machine away. Started on each worker by cluster.yaml; ends with the notice.
#
#   deploy/preemption.sh RAY_ADDRESS [PYTHON]
#
# Spot and preemptible machines get about 30 seconds. The metadata server is asked once how things are, because a notice
# may have come before this was started; after that it answers when the notice comes, so that nothing is asked again and
# again. last_etag is what the last answer was: a notice that comes between two questions is answered at once.
# METADATA_HOST is set by tests.

set -u
address=${1:?usage: $0 RAY_ADDRESS [PYTHON]}
python=${2:-python3}
url="http://${METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance/preempted"

query=""
while true; do
  answer=$(curl --silent --fail --include --header 'Metadata-Flavor: Google' "$url$query")
  if [ "${answer##*$'\n'}" = TRUE ]; then break; fi
  etag=$(sed -n 's/^etag: *\([^[:space:]]*\).*/\1/Ip' <<< "$answer")
  # Without an answer the server went away: ask anew how things are.
  query=${etag:+"?wait_for_change=true&timeout_sec=300&last_etag=$etag"}
  sleep 1
done

"$python" - "$address" "${NODE_IP:-}" <<'PYTHON'
import sys
import time

import ray
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2

address, ip = sys.argv[1:]
ip = ip or ray.util.get_node_ip_address()
client = GcsClient(address=address)
reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
deadline = int((time.time() + 25) * 1000)
for node_id, node in client.get_all_node_info().items():
    if node.node_manager_address == ip and node.state == 0 and not node.is_head_node:
        print("preemption notice: draining", node_id.hex(), client.drain_node(node_id.hex(), reason, "preempted", deadline))
PYTHON
