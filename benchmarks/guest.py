# SPDX-License-Identifier: MIT
"""A plan carried out in the guest that counts instructions."""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from pyublk.vm import Machine
from pyublk.vm.errors import GuestFailed, Interrupted

from .plan import Plan, Results

_ROOT = Path(__file__).parent.parent

# All servers at once: each has buffers of 128 MiB, which sequential jobs fill.
_MEMORY = 4 << 30

#: Under `Results.missing`: how a run ended that did not come to its end.
THE_REST = "the rest"


class GuestStopped(Exception):
    """The run in the guest failed; the message is one sentence."""


def carry_out(plan: Plan, kernel: str) -> Results:
    """Boot the kernel of that name (`latest`, or a series), measure, bring the results back.

    A run that breaks off half-way, or is interrupted, gives what it has measured until then.

    Raises:
        GuestStopped: the run ended without results; its own words came before.
        pyublk.vm.errors.VMError: the machine failed.
    """
    with tempfile.TemporaryDirectory(prefix="pyublk-benchmark-") as directory:
        asked, answered = (Path(directory) / name for name in ("plan.json", "results.json"))
        asked.write_text(plan.to_json())
        # Seconds of the guest take 5 to 20 here, three times that on a busy machine, and fio a
        # third of one beside its run.
        measurements = len(plan.contenders) * len(plan.jobs) * plan.repeats
        limit = 300 + measurements * (plan.runtime + plan.ramp + 0.5) * 60
        machine = Machine(kernel, count_instructions=True, memory=_MEMORY, outputs=[directory])
        line = [sys.executable, "-m", "benchmarks.measure", str(asked), str(answered)]
        try:
            done = machine.run(line, cwd=_ROOT, timeout=limit, forward_signals=True)
            outcome = f"ended with exit code {done.returncode}" if done.returncode else ""
        except (GuestFailed, Interrupted) as error:
            outcome = f"broke off: {error}"
        if not answered.exists():
            raise GuestStopped(f"the run in the guest {outcome or 'measured nothing'}")
        results = Results.load(answered)
        if outcome:
            results = replace(results, missing={**results.missing, THE_REST: outcome})
        return results
