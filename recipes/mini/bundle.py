"""Makes a bundle of a checkpoint in the checkpoint's own folder: a graph that reads the checkpoint's weights.

The folder is then a checkpoint for everything that reads checkpoints, and a bundle for everything that runs bundles,
which needs no PyTorch.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from nvembed_deploy.bundle.manifest import GRAPH, MANIFEST, MODULES, REFERENCE_OUTPUTS, SETTINGS, TOKENIZER, WEIGHTS
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.console import echo
from nvembed_deploy.errors import CheckpointError, ExportError
from nvembed_deploy.export import to_onnx
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.files.hashing import hash_file
from nvembed_deploy.model.sentence_transformers_files import read_prompts

ADDED = (GRAPH, WEIGHTS, REFERENCE_OUTPUTS, MODULES, SETTINGS)
"""Files of the bundle that are written into the checkpoint; the manifest is written behind them.

`modules.json` replaces the checkpoint's: sentence-transformers then runs the bundle, and an export takes nothing from
it.
"""


def add_bundle(checkpoint: Path) -> Path:
    """Exports a checkpoint in FP16, compares it with PyTorch, and adds the graph and the manifest to its folder.

    Args:
        checkpoint: A folder in Hugging Face layout.

    Returns:
        The folder.

    Raises:
        CheckpointError: It has no `tokenizer.json`, or it states prompts in a file that the bundle's would replace.
        ExportError: The export failed; the reason was printed.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / TOKENIZER).is_file():
        raise CheckpointError(f"{checkpoint} has no {TOKENIZER}; pass a checkpoint's folder")
    if (prompts := read_prompts(checkpoint)) is not None:
        raise CheckpointError(f"{prompts.path} would be replaced by the bundle's; export to another folder instead")
    with tempfile.TemporaryDirectory(prefix=".bundle-", dir=checkpoint.parent) as folder:  # links need the same disk
        out = Path(folder, checkpoint.name)
        flags = ["--precision", "fp16", "--onnx-only", "--weights", "reference"]
        with contextlib.redirect_stdout(sys.stderr):
            exit_status = to_onnx.main(["--model", str(checkpoint), *flags, "--out", str(out)])
        if exit_status != 0:
            raise ExportError(f"{checkpoint} could not be exported; see the message above")
        bundle = Bundle.open(out)
        names = tuple(
            path.relative_to(checkpoint).as_posix()
            for path in sorted(checkpoint.rglob("*.json"))
            if path.name not in (MANIFEST, TOKENIZER, MODULES, SETTINGS)
        )
        files = bundle.manifest.files | {name: hash_file(checkpoint / name) for name in names}
        manifest = replace(bundle.manifest, files=dict(sorted(files.items())), checkpoint_files=names)
        for name in ADDED:
            write_file(checkpoint / name, bundle.read(name))
    write_file(checkpoint / MANIFEST, manifest.to_bytes())
    written = Bundle.open(checkpoint).manifest
    echo(f"{checkpoint} is a bundle too: {', '.join(written.files)}")
    return checkpoint
