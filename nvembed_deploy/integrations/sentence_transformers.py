"""A bundle as a `SentenceTransformer`: `load(path)`, or `SentenceTransformer(path, trust_remote_code=True)`.

Both give the vectors of `Encoder`. A prompt reaches the module apart from the text, so an instruction is attended to
and not pooled. `truncate_dim=` and `precision=` are applied by sentence-transformers afterwards: the first cuts vectors
of any model, without scaling them to unit length again unless `normalize_embeddings=True`; the second takes the ranges
of int8 from the texts of the call.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nvembed_deploy.bundle.manifest import MANIFEST, SETTINGS, TOKENIZER
from nvembed_deploy.console import install_command
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import BundleError, ConfigError, InputError, InputTypeError, MissingExtra
from nvembed_deploy.files.hashing import hash_file
from nvembed_deploy.tokenization import Truncate, lone_surrogate, parse_tokenizer

try:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.input_module import InputModule
except ImportError as err:
    raise MissingExtra(
        f"this needs sentence-transformers 6 or newer ({err}); install it: {install_command('sentence-transformers')}"
    ) from err

BACKENDS = {"torch": "auto", "onnx": "onnxruntime", "openvino": "openvino"}
"""Backends of `Encoder` by the names in sentence-transformers; `torch` is its default."""
ENCODER_OPTIONS = ("device", "backend", "threads")
"""Keys of `model_kwargs`."""
SHOWN_CHARS = 60
"""Characters of a text in an error."""
_ADDED_ON_SAVING = ("model_type", "__version__")
"""Fields of the settings that sentence-transformers adds when it saves a model."""
_TEXT_INDEX = re.compile(r"\btext (\d+)\b")


def load(path: str | Path, **encoder_options: Any) -> SentenceTransformer:
    """Returns a `SentenceTransformer` that runs a bundle.

    Its tensors are on the CPU, wherever the engine runs, until `encode(device=...)` or `to` asks for another device.

    Args:
        path: See `Encoder`.
        encoder_options: See `Encoder`: `device`, `backend`, `threads`, `query_instruction`.

    Raises:
        ConfigError: See `Encoder`; likewise for its other errors.
    """
    module = BundleModule(Encoder(path, **encoder_options))
    return _SortedByTokens(
        modules=[module],
        device="cpu",
        prompts=module.encoder.prompts,
        default_prompt_name=module.settings["default_prompt_name"],
        similarity_fn_name=module.settings["similarity_fn_name"],
        truncate_dim=module.settings.get("truncate_dim"),
    )


class _SortedByTokens(SentenceTransformer):
    """A `SentenceTransformer` that sorts texts by their tokens, which in batches of 32 saves a tenth of the padding."""

    model_type = "SentenceTransformer"

    def _input_length(self, sample: Any) -> int:
        """Returns the tokens of a text; theirs returns its characters."""
        if not isinstance(sample, str) or lone_surrogate(sample) is not None:
            return int(SentenceTransformer._input_length(sample))
        return len(self[0].encoder.token_spans(sample))


class _Vectors(dict[str, torch.Tensor]):
    """The module's output: `sentence_embedding`, float32 [N, D]."""

    def __missing__(self, name: str) -> torch.Tensor:
        raise ConfigError(f"a bundle returns one vector per text and no {name}; omit output_value")


class BundleModule(InputModule):
    """The module that runs a bundle in a `SentenceTransformer`: texts to unit vectors, without further modules.

    Args:
        encoder: The open bundle.
    """

    forward_kwargs = {"truncate"}  # noqa: RUF012 (declared so by the base class)
    _anchor: torch.Tensor

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self._settings = encoder.bundle.read(SETTINGS)
        self._max_tokens = encoder.max_length
        # Without parameters, this is what `to` moves; vectors follow it.
        self.register_buffer("_anchor", torch.empty(0, dtype=torch.uint8), persistent=False)

    @property
    def settings(self) -> dict[str, Any]:
        """What `config_sentence_transformers.json` states."""
        settings: dict[str, Any] = json.loads(self._settings)
        return settings

    @property
    def tokenizer(self) -> Any:
        """A copy of the bundle's tokenizer, of the library tokenizers; without the special tokens that rows get."""
        return parse_tokenizer(self.encoder.bundle.read(TOKENIZER))

    @property
    def max_seq_length(self) -> int:
        """Maximum tokens per text, special tokens and prompt included; longer texts are truncated."""
        return self._max_tokens

    @max_seq_length.setter
    def max_seq_length(self, tokens: int) -> None:
        maximum = self.encoder.manifest.text.max_tokens
        if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= maximum:
            raise ConfigError(f"max_seq_length is {tokens!r}; pass a whole number from 1 to {maximum}")
        self._max_tokens = tokens

    def get_embedding_dimension(self) -> int:
        """Returns the dimension D of a vector."""
        return self.encoder.dimension

    def __repr__(self) -> str:
        return f"BundleModule({self.encoder!r})"

    def preprocess(
        self,
        inputs: Sequence[str],
        prompt: str | None = None,
        *,
        truncate: Truncate = True,
        task: str | None = None,
        processing_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Tokenizes texts.

        Args:
            inputs: The texts.
            prompt: The prefix verbatim; by default the model's own, which is empty for most.
            truncate: See `Encoder.encode`.
            task: Ignored; the prompt distinguishes queries from documents.
            processing_kwargs: Not accepted.

        Returns:
            `rows`, a list of N `TokenRow`.

        Raises:
            InputError: An input is not a str, or a text cannot be embedded; the message shows it.
            ConfigError: `truncate` is invalid, or `processing_kwargs` is given.
        """
        if processing_kwargs:
            raise ConfigError("a bundle takes no processing_kwargs; set max_seq_length, or pass truncate")
        for text in inputs:
            if not isinstance(text, str):  # not InputTypeError: a TypeError makes the caller try again without prompt
                raise InputError(
                    f"a bundle embeds texts, and {text!r:.{SHOWN_CHARS}} is a {type(text).__name__}; pass a str"
                )
        try:
            rows = self.encoder.tokenize(inputs, prompt=prompt, max_length=self._max_tokens, truncate=truncate)
        except (InputError, InputTypeError) as err:
            raise InputError(_with_texts(str(err), inputs)) from err
        return {"rows": rows}

    def forward(self, features: Mapping[str, Any], truncate: Truncate = True) -> dict[str, torch.Tensor]:
        """Embeds what `preprocess` returned.

        Returns:
            `sentence_embedding`, float32 [N, D], rows of unit length.

        Raises:
            InputError: The features have another origin.
            NumericsError: See `Encoder.encode`.
        """
        if "rows" not in features:
            raise InputError(f"a bundle embeds what its preprocess returns, not {', '.join(features) or 'nothing'}")
        vectors = torch.from_numpy(self.encoder.encode_rows(features["rows"]))
        return _Vectors(sentence_embedding=vectors.to(self._anchor.device))

    def train(self, mode: bool = True) -> BundleModule:
        """Accepts evaluation mode only.

        Raises:
            ConfigError: Training mode is requested.
        """
        if mode:
            raise ConfigError("a bundle has no parameters to train; train its checkpoint and export it again")
        super().train(False)
        return self

    def on_model_ready(self, model: SentenceTransformer) -> None:
        """Makes `save` write the bundle into the model's own folder if the model has no other module."""
        self.save_in_root = len(model) == 1

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Writes a copy of the bundle, with the prompts that the model was saved with.

        Args:
            output_path: A folder; `SentenceTransformer.save` has written its settings into it.
            args: Ignored.
            safe_serialization: Ignored.
            kwargs: Ignored.

        Raises:
            ConfigError: The folder is the bundle's own.
            BundleError: The bundle on disk changed since it was opened.
        """
        bundle, folder = self.encoder.bundle, Path(output_path)
        settings = self._saved_settings(folder)
        if folder.resolve() == bundle.folder:
            (folder / SETTINGS).write_bytes(self._settings)
            raise ConfigError(f"{bundle.folder} is the folder of the open bundle; save to another one")
        if not bundle.is_current():
            raise BundleError(f"{bundle.folder} changed since it was opened; load it again")
        names = [name for name in bundle.manifest.files if name not in bundle.manifest.checkpoint_files]
        for name in names:
            shutil.copyfile(bundle.folder / name, folder / name)
        (folder / SETTINGS).write_bytes(settings)
        (folder / MANIFEST).write_bytes(self._saved_manifest(folder, names))

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        *,
        model_kwargs: Mapping[str, Any] | None = None,
        backend: str = "torch",
        processor_kwargs: Mapping[str, Any] | None = None,
        config_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> BundleModule:
        """Opens the bundle in a model's folder.

        Args:
            model_name_or_path: The folder, or the name of a hub repository.
            subfolder: Folder of the bundle in it.
            token: Of the hub; likewise the next three.
            cache_folder: See above.
            revision: See above.
            local_files_only: See above.
            model_kwargs: Options of `Encoder`: `device`, `backend`, `threads`.
            backend: `torch` for the best one here, `onnx` or `openvino`.
            processor_kwargs: Not accepted.
            config_kwargs: Not accepted.
            kwargs: Ignored.

        Raises:
            ConfigError: An option is unknown.
            BundleError: See `Encoder`; likewise for its other errors.
        """
        options = {"backend": BACKENDS.get(backend, backend), **(model_kwargs or {})}
        unknown = [*(options.keys() - {*ENCODER_OPTIONS}), *(processor_kwargs or ()), *(config_kwargs or ())]
        if unknown:
            raise ConfigError(
                f"{unknown[0]!r} is not an option of a bundle; model_kwargs can have: {', '.join(ENCODER_OPTIONS)}"
            )
        folder = cls.load_dir_path(
            model_name_or_path,
            subfolder=subfolder,
            token=token,
            cache_folder=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
        return cls(Encoder(folder or model_name_or_path, **options))

    def _saved_settings(self, folder: Path) -> bytes:
        """Returns a copy's settings: those that the model was saved with, or the bundle's own if they are equal."""
        try:
            content = (folder / SETTINGS).read_bytes()
        except FileNotFoundError:
            return self._settings
        settings = {name: value for name, value in json.loads(content).items() if name not in _ADDED_ON_SAVING}
        return self._settings if settings == self.settings else content

    def _saved_manifest(self, folder: Path, names: Sequence[str]) -> bytes:
        """Returns the manifest of a copy, which has the prompts of its settings."""
        manifest = self.encoder.manifest
        prompts = json.loads((folder / SETTINGS).read_bytes())["prompts"]
        if prompts != self.settings["prompts"]:
            manifest = replace(manifest, text=replace(manifest.text, prompts=prompts))
        files = {name: manifest.files[name] for name in names} | {SETTINGS: hash_file(folder / SETTINGS)}
        return replace(manifest, files=files, checkpoint_files=()).to_bytes()


def _with_texts(message: str, texts: Sequence[str]) -> str:
    """Replaces the index of a text, which is one in a sorted batch, by the text's beginning."""
    return _TEXT_INDEX.sub(lambda match: f"text {texts[int(match[1])][:SHOWN_CHARS]!r}", message)
