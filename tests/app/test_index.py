"""Indexes return the results of an exhaustive search, and reject other collections' data."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nvembed_deploy import ConfigError, Encoder, MissingExtra
from nvembed_deploy.app.index import FOLDER, ServerIndex, opener
from nvembed_deploy.app.library import LOCK, Library
from nvembed_deploy.app.passages import Passage
from nvembed_deploy.app.store import Engine, FolderStore
from tests.app.conftest import few_passages

ENGINE = Engine(model="tiny", precision="fp32", manifest_sha256="0" * 64, dimension=32)
ROWS, SOURCES = 3000, 7
pytestmark = pytest.mark.filterwarnings("ignore:Local mode performs", "ignore:Payload indexes have no effect")


@pytest.fixture(scope="module")
def written_collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collections") / "mine"
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(ROWS, 32)) + 2 * rng.normal(size=(40, 32))[rng.integers(0, 40, ROWS)]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    passages = [Passage(source=f"s{row % SOURCES}", title=str(row), text="x") for row in range(ROWS)]
    FolderStore.write(folder, ENGINE, passages, vectors.astype(np.float32))
    return folder


def memory_server(content: object) -> ServerIndex:
    """Returns an index on the client's in-memory replacement of a server."""
    client = pytest.importorskip("qdrant_client", reason="not installed: pip install nvembed-deploy[qdrant]")
    return ServerIndex(content, client.QdrantClient(":memory:"), "memory")


@pytest.mark.parametrize("kind", ["edge", "server"])
def test_an_index_finds_nearly_all_that_an_exhaustive_search_finds(
    written_collection: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "edge":
        pytest.importorskip("qdrant_edge", reason="not installed: pip install nvembed-deploy[qdrant]")
    folder = Path(shutil.copytree(written_collection, tmp_path / "mine"))
    exact = FolderStore(folder)
    store = FolderStore(folder, opener("qdrant") if kind == "edge" else memory_server)
    rng, recalls = np.random.default_rng(1), []
    for _ in range(50):
        query = exact.vectors[rng.integers(ROWS)] + 0.2 * rng.normal(size=32)
        query = (query / np.linalg.norm(query)).astype(np.float32)
        for sources in ((), ("s1", "s4")):
            best = exact.search(ENGINE, query, count=10, sources=sources)
            hits = store.search(ENGINE, query, count=10, sources=sources)
            assert len(best) == len(hits) == 10
            assert not sources or {hit.passage.source for hit in hits} <= set(sources)
            scores = {hit.passage.title: hit.score for hit in best}
            assert all(abs(scores[hit.passage.title] - hit.score) < 1e-6 for hit in hits if hit.passage.title in scores)
            recalls.append(len(scores.keys() & {hit.passage.title for hit in hits}) / 10)
    assert np.mean(recalls) > 0.98
    assert store.search(ENGINE, query, count=5, sources=["nothing"]) == []
    with pytest.raises(ConfigError, match="was made by another"):
        store.search(Engine(**(vars(ENGINE) | {"precision": "int8"})), query, count=1)


def test_a_local_index_is_built_once_and_deleted_with_its_collection(encoder: Encoder, tmp_path: Path) -> None:
    pytest.importorskip("qdrant_edge", reason="not installed: pip install nvembed-deploy[qdrant]")
    library = Library(tmp_path / "collections", encoder, index="qdrant")
    list(library.add_steps("mine", few_passages()[:2]))
    list(library.add_steps("mine", few_passages()[2:]))
    assert (library.folder / "mine" / FOLDER).is_dir()
    assert library.names() == ["mine"]
    assert {path.name for path in library.folder.iterdir()} == {"mine", f".mine{LOCK}"}
    assert len(library.open("mine").search(library.engine, encoder.encode("rows"), count=9)) == 3
    inode = (library.folder / "mine" / FOLDER).stat().st_ino
    reopened = Library(library.folder, encoder, index="qdrant")
    reopened.open("mine")
    assert (library.folder / "mine" / FOLDER).stat().st_ino == inode
    reopened.delete("mine")
    assert [path.name for path in library.folder.iterdir()] == [f".mine{LOCK}"]


def test_a_damaged_index_error_says_how_to_rebuild_it(written_collection: Path, tmp_path: Path) -> None:
    pytest.importorskip("qdrant_edge", reason="not installed: pip install nvembed-deploy[qdrant]")
    folder = Path(shutil.copytree(written_collection, tmp_path / "mine"))
    (folder / FOLDER).mkdir()
    (folder / FOLDER / "edge_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"the index in .* failed .* delete the folder to rebuild it"):
        FolderStore(folder, opener("qdrant"))


def test_an_index_of_another_collection_is_refused(written_collection: Path, tmp_path: Path) -> None:
    pytest.importorskip("qdrant_edge", reason="not installed: pip install nvembed-deploy[qdrant]")
    folder = Path(shutil.copytree(written_collection, tmp_path / "mine"))
    FolderStore(folder, opener("qdrant"))
    other_folder = tmp_path / "other"
    FolderStore.write(other_folder, ENGINE, few_passages(), np.eye(3, 32, dtype=np.float32))
    shutil.copytree(folder / FOLDER, other_folder / FOLDER)
    with pytest.raises(ConfigError, match="belongs to another collection; delete the folder"):
        FolderStore(other_folder, opener("qdrant"))


def test_a_server_is_filled_once_and_again_after_an_interrupted_fill(written_collection: Path) -> None:
    client = pytest.importorskip("qdrant_client", reason="not installed: pip install nvembed-deploy[qdrant]")
    memory = client.QdrantClient(":memory:")
    calls: list[str] = []

    class Recording:
        def __getattr__(self, name: str) -> object:
            calls.append(name)
            return getattr(memory, name)

    def fill(content: object) -> ServerIndex:
        return ServerIndex(content, Recording(), "memory")

    FolderStore(written_collection, fill)
    assert calls.count("upsert") == -(-ROWS // 1000)
    calls.clear()
    store = FolderStore(written_collection, fill)
    assert "upsert" not in calls
    name = memory.get_collections().collections[0].name
    memory.delete(name, points_selector=[1, 2, 3])
    FolderStore(written_collection, fill)
    assert memory.count(name).count == ROWS
    store.drop_index()
    assert memory.get_collections().collections == []


def test_unknown_kinds_and_unreachable_servers_are_reported(
    written_collection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"--index must be exact, qdrant, or the URL .*, got 'faiss'"):
        opener("faiss")
    pytest.importorskip("qdrant_client", reason="not installed: pip install nvembed-deploy[qdrant]")
    with pytest.raises(ConfigError, match=r"the Qdrant server at http://127\.0\.0\.1:9 failed .* --index exact"):
        FolderStore(written_collection, opener("http://127.0.0.1:9"))

    def missing(name: str) -> SimpleNamespace:
        raise ImportError(f"no {name}")

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(MissingExtra, match=r"pip install -e '.*\[qdrant\]'"):
        opener("qdrant")
