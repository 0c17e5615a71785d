"""A build within the test's own process, in a work folder that goes away unless the options name one."""

import tempfile
from dataclasses import replace
from pathlib import Path

from cache_builder.build import FindBundle, build, no_bundle
from cache_builder.options import BuildOptions, Summary
from cache_builder.store import Store
from cache_builder.workers import ThisProcess
from model.bundle import Bundle
from model.progress import Reporter


def build_here(
    bundle: Bundle, data: Path, store: Store, options: BuildOptions, reporter: Reporter,
    find_bundle: FindBundle = no_bundle,
) -> Summary:  # fmt: skip
    """`build`, by this process alone."""
    workers = ThisProcess(bundle, store)
    if options.work != BuildOptions.work:
        return build(bundle, data, store, workers, options, reporter, find_bundle)
    with tempfile.TemporaryDirectory(prefix="lrea-work-") as work:
        return build(bundle, data, store, workers, replace(options, work=Path(work)), reporter, find_bundle)
