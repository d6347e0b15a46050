"""What did the audit cost? Time by step, speed and memory."""

import resource
import sys

from sonde.runs.blocks import Chapter, Column, Table
from sonde.runs.report.numbers import number
from sonde.studies.chapters.part import Part


class Cost(Part):
    """Time by step and peak memory of the process."""

    name = "cost"

    def write(self) -> Chapter:
        """One table; the report's own writing is not in it."""
        audit = self.audit
        steps = [[step, seconds] for step, seconds in audit.timings.items()]
        total = sum(seconds for _, seconds in steps)
        read = audit.timings.get("reading")
        tokens = audit.held.n_chunks * audit.held.context
        speed = f" It read {number(tokens / read)} tokens per second for all chapters together." if read else ""
        return Chapter(
            id=self.name,
            question="What did this audit cost?",
            answer=f"{number(total)} seconds of computing and {number(_peak_gigabytes())} GB of memory.{speed}",
            blocks=[
                Table(
                    id="cost.steps",
                    caption="Time by step, of the process that finished the audit",
                    columns=["step", Column(name="time", unit="s")],
                    rows=steps,
                    empty="No step took time in this process: it only wrote down what an earlier one had found.",
                )
            ],
            not_shown="Times depend on the machine and on what else it was doing; loading the model is not counted.",
            how="Wall-clock time around each step; peak resident memory of the whole process as the system reports it.",
        )


def _peak_gigabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)
