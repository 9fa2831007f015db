"""No text of the evaluation sets enters training, measured differently from how the exclusion itself works."""

import random

import pytest

from tests.conftest import ROOT

SHARED = ROOT.parent / "shared" / "data"
if not SHARED.is_dir():
    pytest.skip("the data sets are not next to this checkout", allow_module_level=True)
text_features = pytest.importorskip("sklearn.feature_extraction.text", reason="needs pip install nvembed-deploy[train]")

from nvembed_deploy.files.json_lines import read_rows  # noqa: E402
from nvembed_deploy.training.blend import select  # noqa: E402
from nvembed_deploy.training.examples import read_exclusion  # noqa: E402
from recipes.mini.corpora import read_data  # noqa: E402
from recipes.mini.make import STAGE_2_MIX  # noqa: E402

SAMPLE = 1500
MAX_CHARS = 250


@pytest.mark.slow
def test_no_training_text_is_close_to_an_evaluation_text():
    examples = select(read_data(SHARED / "train"), mix=STAGE_2_MIX, seed=1)
    sample = random.Random(0).sample(examples, SAMPLE)
    train_texts = [text for example in read_exclusion(SHARED / "eval").filter(sample) for text in example.texts]
    strings = {
        field
        for path in (SHARED / "eval").rglob("*.jsonl")
        for row in read_rows(path)
        for field in row.values()
        if isinstance(field, str) and len(field) <= MAX_CHARS
    }
    features = text_features.HashingVectorizer(analyzer="word", ngram_range=(1, 2), binary=True, token_pattern=r"\w+")
    evaluation = features.transform(sorted(strings))

    def close_count(texts):
        """Counts the texts that are close to an evaluation text: cosine of words and pairs of words."""
        short = [text for text in texts if len(text) <= MAX_CHARS]
        return int(((features.transform(short) @ evaluation.T).max(axis=1).toarray() >= 0.9).sum())

    assert len(train_texts) > SAMPLE // 2
    assert close_count(train_texts) == 0
    assert close_count([text for example in sample for text in example.texts]) > 0  # the measure does find such texts
