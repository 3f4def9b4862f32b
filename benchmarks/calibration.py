"""Time and memory of quantizing a 367M-parameter Llama with GPTQ on 128 sequences of 512 tokens.

    python benchmarks/calibration.py

The weights are random: what is measured is the work, not the accuracy. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import click
from foundation import TINY, make_367m, run_python

COMPILE = """
import json, sys, time
from pathlib import Path

started = time.perf_counter()
from optc.optimizer.compile import compile
from optc.optimizer.progress import Progress
progress = Progress()
compile(sys.argv[1], sys.argv[2], quantize="w4a16-g128", algorithm="gptq", calibration_samples=128,
        calibration_length=512, backend=sys.argv[3], progress=progress)
seconds = time.perf_counter() - started
status = Path("/proc/self/status").read_text()
peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
print(json.dumps({"seconds": seconds, "peak": peak, **{f"stage {k}": v for k, v in progress.seconds.items()}}))
"""


@click.command()
@click.option("--backend", default="inductor", show_default=True)
def main(backend: str) -> None:
    """Compile the model with w4a16-g128 and GPTQ; print seconds of each stage and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_367m(Path(folder))
        for name in ("tokenizer.json", "tokenizer_config.json", "calibration.txt"):
            shutil.copy(TINY / name, model)  # ids of the small tokenizer are ids of the large vocabulary too
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        found = run_python(COMPILE, str(model), str(Path(folder) / "out.optc"), backend)
    for name, value in found.items():
        if name == "peak":
            click.echo(f"peak memory: {value / 1e6:.0f} MB = {value / size:.2f}x the checkpoint")
        else:
            click.echo(f"{name}: {value:.1f} s")


if __name__ == "__main__":
    main()
