"""An extraction from its configuration to its summary. Neither Ray nor the backbone is loaded if nothing is left.

On a cluster Ray is asked first what there is, if what is kept of the backbone does not show that nothing is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from brainenc.extract.config import ExtractConfig, ExtractProgress, ExtractSummary
from brainenc.extract.estimate import plan_of
from brainenc.extract.plan import check_space
from brainenc.extract.prepare import create, survey, tidy
from brainenc.extract.run import Run
from brainenc.extract.site import site_of


def extract(config: ExtractConfig, *, progress: Callable[[ExtractProgress], None] | None = None) -> ExtractSummary:
    """Compute what the store lacks. Driver only; blocks until done; the same call again goes on where it ended.

    Raises:
        NoSpace: what is left does not fit, known before anything starts; or the disk filled up meanwhile.
        BadImages: some images cannot be read (``on_bad_image="fail"``); the other shards are sealed.
        ExtractionFailed: workers kept dying, or failed.
        StoppedSafely: a signal or the guard asked to stop; what was sealed stays.
        KeyboardInterrupt: Ctrl-C, after the same safe stop.
    """
    started = time.perf_counter()
    with site_of(config) as site:
        found = survey(config, site=site, repeat=True)
        tidy(found)
        check_space(plan_of(found))
        run = Run(
            config=config, tasks=found.tasks, wanted=found.wanted, collections=create(found), started=started
        )  # fmt: skip
        if run.tasks:
            from brainenc.extract.pipeline import drive

            drive(run, found, progress)
            tidy(found)  # also what was too young at the start, and what a worker that died left now
    return run.finish()
