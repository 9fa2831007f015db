"""A decoder that starts from a teacher's layers, on a BERT of a few thousand weights."""

import random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[train]")
for library in ("transformers", "sentence_transformers"):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install nvembed-deploy[train]")

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors  # noqa: E402

from nvembed_deploy.errors import ConfigError  # noqa: E402
from nvembed_deploy.model.config import LatentAttention  # noqa: E402
from nvembed_deploy.model.config_json import read_architecture  # noqa: E402
from nvembed_deploy.model.decoder import Decoder  # noqa: E402
from nvembed_deploy.tokenization import TextEncoder  # noqa: E402
from nvembed_deploy.training.groups import Row  # noqa: E402
from nvembed_deploy.training.student import contract, nvembed_config  # noqa: E402
from recipes.mini import transplant as tested  # noqa: E402
from recipes.mini.bert_states import token_rows  # noqa: E402
from recipes.mini.pieces import teacher_pieces  # noqa: E402
from recipes.mini.start import ROPE_THETA  # noqa: E402
from recipes.mini.teacher import Teacher  # noqa: E402
from recipes.mini.tokenizer import LETTERS, SPACE, piece_tokenizer  # noqa: E402
from recipes.mini.trainer import MiniCollator  # noqa: E402
from tests.training.tiny_training import sizes  # noqa: E402

HIDDEN_SIZE = 16
WORDS = [f"{start}{end}" for start in "bdfgklmn" for end in ("ab", "ec", "id", "of", "ug")]
CONTROL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def bert_folder(folder):
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {token: token_id for token_id, token in enumerate([*CONTROL, *WORDS, "##s"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), CONTROL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=256,
        initializer_range=0.25,
    )
    model = BertModel(config)
    # A row of positions is small beside a row of words, as in a trained model.
    model.embeddings.position_embeddings.weight.data.mul_(0.2)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    bert_folder(folder)
    return Teacher(str(folder))


def tokenizer_json() -> str:
    pieces = [*(SPACE + word for word in WORDS), "s"]
    return str(piece_tokenizer(pieces, vocab_size=3 + 256 + 1 + 2 * len(LETTERS) + len(WORDS)).to_str())


def config(**changes):
    tokens = Tokenizer.from_str(tokenizer_json()).get_vocab_size()
    start_fields = {"rope_theta": ROPE_THETA, "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": tokens}
    return {**sizes(), **start_fields, **changes}


def texts(count: int, seed: int):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(count)]


def cosines(weights, mistral_config, teacher, probe_texts):
    architecture = read_architecture(nvembed_config(mistral_config, LatentAttention(head_dim=HIDDEN_SIZE)))
    decoder = Decoder(architecture)
    decoder.load_state_dict(weights)
    encoder = TextEncoder(tokenizer_json().encode(), contract(architecture))
    batch = MiniCollator(encoder, max_length=64, teacher=teacher)([[(Row(text=text),) for text in probe_texts]])
    mask = batch["attention_mask"]
    with torch.no_grad():
        hidden = decoder(batch["input_ids"], mask) * mask[:, :, None]
        targets, _ = teacher.forward(batch["teacher_ids"], batch["teacher_mask"])
    return torch.nn.functional.cosine_similarity(hidden.sum(dim=1), targets, dim=-1)


def test_a_new_decoder_is_close_to_its_teacher_on_held_out_texts(teacher):
    mistral_config = config()
    transplanted = tested.transplant(
        teacher, texts(600, 1), config=mistral_config, tokenizer_json=tokenizer_json(), max_length=64
    )
    unseen = cosines(transplanted.weights, mistral_config, teacher, texts(100, 2))
    assert unseen.mean() > 0.93, "the weights do not compute what the teacher does"
    assert transplanted.agreement == pytest.approx(float(unseen.mean()), abs=0.02)
    silenced = {
        name: torch.zeros_like(tensor) if "down_proj" in name or "o_proj" in name else tensor
        for name, tensor in transplanted.weights.items()
    }
    assert cosines(silenced, mistral_config, teacher, texts(100, 2)).mean() < unseen.mean() - 0.1, "layers matter here"


def test_tokens_map_to_the_teachers_pieces(teacher):
    rows = token_rows(Tokenizer.from_str(tokenizer_json()), teacher)
    vocabulary = Tokenizer.from_str(tokenizer_json()).get_vocab()
    table = next(teacher.model.children()).auto_model.embeddings.word_embeddings.weight
    teacher_vocabulary = teacher.tokenizer.get_vocab()
    for token, theirs in (("▁bab", "bab"), ("<s>", "[CLS]"), ("</s>", "[SEP]"), ("s", "##s"), ("<0x41>", "[UNK]")):
        assert torch.equal(rows[vocabulary[token]], table[teacher_vocabulary[theirs]]), token


def test_fitted_waves_sum_to_the_scores():
    speeds = torch.tensor([1.0, 0.2])
    distances = torch.arange(-tested.MAX_DISTANCE, tested.MAX_DISTANCE + 1)
    scores = 2.0 * torch.cos(distances * 1.0) - 0.5 * torch.sin(distances * 0.2) + 7.0
    amplitudes = tested._waves(scores[None], torch.ones(len(distances)), speeds)
    assert amplitudes.shape == (1, 2, 2)
    assert torch.allclose(amplitudes[0], torch.tensor([[2.0, 0.0], [0.0, -0.5]]), atol=0.02)


def test_unsupported_teachers_are_refused(teacher):
    def started(mistral_config, model=teacher):
        return tested.transplant(
            model, texts(8, 1), config=mistral_config, tokenizer_json=tokenizer_json(), max_length=64
        )

    with pytest.raises(ConfigError, match=r"\(16, 3, 2, 8\); for this teacher they must be \(16, 2, 2, 8\)"):
        started(config(num_hidden_layers=3))
    not_a_bert = object.__new__(Teacher)
    not_a_bert.__dict__ |= {**teacher.__dict__, "model": torch.nn.Sequential(torch.nn.Identity())}
    with pytest.raises(ConfigError, match="only a BERT can be the teacher"):
        started(config(), not_a_bert)
    with pytest.raises(
        ConfigError, match=r"the texts have \d+ tokens, but layers of this size need 640; pass more text"
    ):
        started(config())


def test_activations_other_than_gelu_are_refused(teacher, monkeypatch):
    monkeypatch.setattr(next(teacher.model.children()).auto_model.config, "hidden_act", "relu")
    with pytest.raises(ConfigError, match="the teacher's activation is relu"):
        token_rows(Tokenizer.from_str(tokenizer_json()), teacher)


def test_no_more_tokens_are_stored_than_allowed(teacher, monkeypatch):
    seen = []
    solver = tested._Solver
    monkeypatch.setattr(tested, "CALIBRATION_TOKENS", 1000)
    monkeypatch.setattr(tested, "_Solver", lambda *args: seen.append(args[3]) or solver(*args))
    tested.transplant(teacher, texts(600, 1), config=config(), tokenizer_json=tokenizer_json(), max_length=64)
    assert 980 < sum(int(batch.real.sum()) for batch in seen[0]) <= 1000


def test_a_teachers_pieces_by_their_number_and_their_rank(teacher):
    pieces = teacher_pieces(teacher, [" ".join(["nug"] * 50), "bofs"])
    assert pieces[:2] == ["▁nug", "▁bab"]  # the frequent one, and the first of the vocabulary
    assert pieces.index("▁bof") < pieces.index("▁bug")  # which stands before it, but not in the text
    assert {"s", "▁kid"} <= set(pieces)
    assert not any("[" in piece or "#" in piece for piece in pieces)


def test_a_base_model_is_made_and_can_be_trained(teacher, tmp_path, capsys, monkeypatch):
    from nvembed_deploy.model.checkpoint import load_checkpoint
    from nvembed_deploy.training.examples import Example, write_examples
    from nvembed_deploy.training.instructions import Kind
    from recipes.mini import teacher as teachers
    from recipes.mini.__main__ import main

    monkeypatch.setattr(teachers, "Teacher", lambda folder: teacher)
    pairs = [Example(query=text, positive=text[:9], kind=Kind.RETRIEVAL, source="s") for text in texts(300, 5)]
    examples, base, out = (tmp_path / name for name in ("examples.jsonl", "base", "out"))
    write_examples(examples, pairs)
    size = str(3 + 256 + 1 + 2 * len(LETTERS) + len(WORDS))
    start = ["start", "--examples", str(examples), "--out", str(base)]
    assert main([*start, "--vocab-size", size, "--neurons", "32"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == str(base)
    assert float(captured.err.strip().split()[-1]) > 0.85
    flags = ["stage", "--base", str(base), "--examples", str(examples), "--stage", "1", "--out", str(out)]
    flags += ["--latents", "4", "--max-steps", "2", "--batch-queries", "16", "--warmup-steps", "1", "--relative-steps"]
    assert main(flags) == 0
    assert load_checkpoint(out).config.layers == 2
    for extra_flags, message in (
        (["--vocab-size", "200"], "for bytes and letters, got 200"),
        (["--vocab-size", "99999"], "the number of available pieces; got 99999"),
        (["--vocab-size", size, "--neurons", "33"], "--neurons must be from 1 to 32, the teacher's number; got 33"),
    ):
        assert main([*start, *extra_flags]) == 1
        assert message in capsys.readouterr().err
    assert (base / "config.json").is_file(), "a refused call leaves what was there"
