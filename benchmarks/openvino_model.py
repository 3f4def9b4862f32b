"""A checkpoint as OpenVINO's IR, as `optimum-cli export openvino` makes it. Runs in the environment of the peers.

    python openvino_model.py CHECKPOINT FOLDER --weights int4|int8|bf16 --tokenizer FOLDER

int4 is symmetric in groups of 128 with the output layer and the embedding in int8; int8 is symmetric by row; neither
needs data. OpenVINO GenAI wants a tokenizer, whatever it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

OPTIONS: dict[str, dict[str, Any] | None] = {
    "int4": {"bits": 4, "sym": True, "group_size": 128, "ratio": 1.0},
    "int8": {"bits": 8, "sym": True},
    "bf16": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--weights", choices=list(OPTIONS), required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    args = parser.parse_args()

    import openvino
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import PreTrainedTokenizerFast

    options = OPTIONS[args.weights]
    config = OVWeightQuantizationConfig(**options) if options else None
    model = OVModelForCausalLM.from_pretrained(
        args.checkpoint, export=True, compile=False, load_in_8bit=False, quantization_config=config
    )
    model.save_pretrained(args.output)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.tokenizer)
    tokenizer.save_pretrained(args.output)
    for part, name in zip(
        convert_tokenizer(tokenizer, with_detokenizer=True), ("tokenizer", "detokenizer"), strict=True
    ):
        openvino.save_model(part, args.output / f"openvino_{name}.xml")


if __name__ == "__main__":
    main()
