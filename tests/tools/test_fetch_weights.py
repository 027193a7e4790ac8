"""tools/fetch_weights.py: the published addresses, and files that arrive whole or not at all whatever a server does."""

import fcntl
import io
import re
import subprocess
import sys
from urllib.parse import unquote

import numpy as np
import pytest
from rank_processes import ROOT
from web_server import Server, serving
from weights.reference import gen_npz

from vitds import download, transport
from vitds.errors import UsageError, WeightError
from vitds.layouts.google import google_layout
from vitds.model.registry import MODELS, get_spec
from vitds.published_weights import PUBLISHED, PublishedWeights, find_weights

# What the seed's README lists, and its two templates.
SEED_21K = ("ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-H_14", "R50-ViT-B_16")
SEED_1K = ("ViT-B_16-224", "ViT-B_16", "ViT-B_32", "ViT-L_16-224", "ViT-L_16", "ViT-L_32", "R50-ViT-B_16")
SEED_TEMPLATES = {
    "imagenet21k": "https://storage.googleapis.com/vit_models/imagenet21k/{MODEL_NAME}.npz",
    "imagenet21k+imagenet2012": "https://storage.googleapis.com/vit_models/imagenet21k+imagenet2012/{MODEL_NAME}.npz",
}
# Sizes in MiB in Google's README, of the recommended AugReg files before fine-tuning.
AUGREG_MIB = {
    "ViT-L_16": 1243, "ViT-B_16": 391, "ViT-S_16": 115, "R50-ViT-L_32": 1337, "R26-ViT-S_32": 170, "ViT-Ti_16": 37,
    "ViT-B_32": 398, "ViT-S_32": 118, "R-ViT-Ti_16": 40,
}  # fmt: skip


@pytest.mark.parametrize(
    "collection, model",
    [("imagenet21k", model) for model in SEED_21K] + [("imagenet21k+imagenet2012", model) for model in SEED_1K],
)
def test_every_file_that_the_seed_names_is_at_the_seed_s_address(collection, model):
    weights = find_weights(f"{collection}/{model}")
    google_name = model.replace("R50-", "R50+")
    assert unquote(weights.url()) == SEED_TEMPLATES[collection].format(MODEL_NAME=google_name)
    assert "+" not in weights.url()  # %2B: a + in a path is a space to some servers
    assert weights.file_name == f"{google_name}.npz"
    assert (weights.num_classes, weights.pre_logits is None) == ((21843, False), (1000, True))["2012" in collection]
    assert weights.image_size == (224 if collection == "imagenet21k" or model.endswith("-224") else 384)
    assert find_weights(weights.url()) == find_weights(weights.path) == weights


def test_what_is_published_is_the_seed_s_list_and_the_recommended_augreg_files():
    augreg = {f"augreg{tuned}/{model}" for model in AUGREG_MIB for tuned in ("", "+imagenet2012")}
    seed = {f"imagenet21k/{model}" for model in SEED_21K} | {f"imagenet21k+imagenet2012/{model}" for model in SEED_1K}
    assert PUBLISHED.keys() == augreg | seed
    assert {weights.model for weights in PUBLISHED.values()} <= MODELS.keys()


@pytest.mark.parametrize("model, mib", AUGREG_MIB.items())
def test_augreg_sizes_are_those_of_google_s_readme(model, mib):
    upstream, tuned = find_weights(f"augreg/{model}"), find_weights(f"augreg+imagenet2012/{model}")
    assert abs(upstream.size_range[0] / 2**20 - mib) < 1
    assert tuned.path.startswith(upstream.path.removesuffix(".npz") + "--imagenet2012-steps_20k-lr_0.0")
    assert tuned.path.endswith("-res_384.npz") and (tuned.image_size, tuned.num_classes) == (384, 1000)


def test_a_name_alone_is_the_file_that_fine_tuning_starts_from():
    assert find_weights("ViT-B_16").name == "imagenet21k/ViT-B_16"
    assert find_weights("R50+ViT-B_16.npz").name == find_weights("R50-ViT-B_16").name == "imagenet21k/R50-ViT-B_16"
    assert find_weights("ViT-L_16-224").name == "imagenet21k+imagenet2012/ViT-L_16-224"
    with pytest.raises(UsageError) as error:
        find_weights("ViT-S_16")
    assert "augreg/ViT-S_16" in error.value.fix and "augreg+imagenet2012/ViT-S_16" in error.value.fix
    for wrong, near in (("ViT-B16", "ViT-B_16"), ("imagenet21k/ViT-S_16", "imagenet21k/ViT-L_16")):
        with pytest.raises(UsageError) as error:
            find_weights(wrong)
        assert f'did you mean "{near}"' in error.value.fix


TINY = PublishedWeights(
    name="some+tuned/tiny",
    path="some+tuned/R50+tiny.npz",
    model="custom:width=32,depth=2,heads=2,mlp=64,patch=8",
    image_size=48,
    num_classes=10,
    pre_logits=None,
    top1=None,
    source="",
)


def npz(arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


@pytest.fixture(scope="module")
def content():
    return npz(gen_npz.weights("tiny", "imagenet21k+imagenet2012"))


@pytest.fixture
def server(content, monkeypatch):
    monkeypatch.setattr(download, "_PATIENCE", download._PATIENCE._replace(pause_s=0, longest_pause_s=0))
    monkeypatch.setattr(transport, "_CHUNK_BYTES", 10_000)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    server.files["/some+tuned/R50+tiny.npz"] = content
    with serving(server) as server.address:
        yield server


class Fetch:
    """Runs fetch into one directory, and keeps what it said."""

    def __init__(self, server, directory):
        self.server, self.directory = server, directory / "out"
        self.target, self.part = self.directory / "R50+tiny.npz", self.directory / "R50+tiny.npz.part"
        self.notes, self.progress = [], []

    def __call__(self, base=None):
        return download.fetch(
            TINY,
            self.directory,
            base or self.server.address,
            on_progress=lambda *done: self.progress.append(done),
            on_note=self.notes.append,
        )

    def leave_part(self, content):
        self.directory.mkdir(exist_ok=True)
        self.part.write_bytes(content)

    def fails(self, *said, kind=WeightError, code=4):
        with pytest.raises(kind) as failed:
            self()
        assert failed.value.exit_code == code
        for one in said:
            assert one in str(failed.value), failed.value
        assert not self.target.exists()


@pytest.fixture
def fetched(server, tmp_path):
    return Fetch(server, tmp_path)


def whole(fetched, content):
    return sorted(fetched.directory.iterdir()) == [fetched.target] and fetched.target.read_bytes() == content


def test_a_file_arrives_whole_under_its_own_name(fetched, server, content):
    assert fetched() == fetched.target and whole(fetched, content)
    assert server.requests == [("/some%2Btuned/R50%2Btiny.npz", None)]
    assert fetched.progress[-1] == (len(content), len(content)) and len(fetched.progress) > 3
    assert fetched.notes == []


def test_a_partial_file_is_continued_and_not_sent_again(fetched, server, content):
    fetched.leave_part(content[:30_000])
    fetched()
    assert whole(fetched, content)
    assert [asked for _, asked in server.requests] == ["bytes=30000-"] and fetched.progress[0][0] > 30_000


@pytest.mark.parametrize("behaviour", [{"ranges": False}, {"range_offset": 7}])
def test_a_server_that_does_not_continue_sends_it_all_again(fetched, server, content, behaviour):
    vars(server).update(behaviour)
    fetched.leave_part(content[:30_000])
    fetched()
    assert whole(fetched, content) and "starting over" in fetched.notes[0]


def test_a_connection_that_breaks_is_taken_up_again(fetched, server, content):
    server.drop_after = 25_000
    fetched()
    assert whole(fetched, content)
    asked = [int(one.removeprefix("bytes=").removesuffix("-")) for _, one in server.requests[1:]]
    assert asked == list(range(25_000, len(content), 25_000)) and "broken off at 25,000 bytes" in fetched.notes[0]


def test_a_server_that_is_gone_for_good_leaves_what_came_and_says_so(fetched, server, content):
    server.drop_after, server.num_drops = 25_000, 1
    answer = server.answer
    server.answer = lambda handler: answer(handler) if not server.requests else None  # hangs up without a word
    fetched.fails("cannot be fetched", "25,000 bytes are kept in", str(fetched.part), "wget https://", "--from")
    assert fetched.part.read_bytes() == content[:25_000]
    server.answer = answer
    fetched()
    assert whole(fetched, content)


def test_no_network_is_one_message_and_leaves_nothing(fetched):
    with pytest.raises(WeightError) as failed:
        fetched("http://127.0.0.1:9")
    assert "Connection refused" in str(failed.value) and "http://127.0.0.1:9/some%2Btuned" in str(failed.value)
    assert list(fetched.directory.iterdir()) == [] and fetched.notes == []


@pytest.mark.parametrize("status, said", [(404, "404 Not Found"), (403, "403 Forbidden"), (503, "503 Service")])
def test_an_answer_that_is_no_file_is_said(fetched, server, status, said):
    server.status = status
    fetched.fails(said, server.address)
    assert list(fetched.directory.iterdir()) == []


@pytest.mark.parametrize("status", [404, 503])
def test_a_failing_server_keeps_what_was_there(fetched, server, content, status):
    server.status = status
    fetched.leave_part(content[:1000])
    fetched.fails(str(status))
    assert fetched.part.read_bytes() == content[:1000]


def test_a_page_in_the_place_of_the_file_is_refused(fetched, server):
    server.files["/some+tuned/R50+tiny.npz"] = b"<!DOCTYPE html>\n<title>Sign in</title>" + b" " * 100_000
    fetched.fails("no .npz", "<!DOCTYPE html>")
    assert list(fetched.directory.iterdir()) == []


@pytest.mark.parametrize("size", [1_000, 1_000_000])
def test_a_file_of_an_impossible_size_is_refused_before_it_is_sent(fetched, server, size):
    server.files["/some+tuned/R50+tiny.npz"] = b"PK\3\4" + bytes(size - 4)
    fetched.fails(f"{size:,} bytes", f"{TINY.num_parameters:,} float32 parameters")
    assert list(fetched.directory.iterdir()) == []


def test_a_server_that_claims_too_many_bytes_does_not_matter(fetched, server, content):
    server.claimed_size = len(content) + 1000
    fetched()
    assert whole(fetched, content)


def test_a_server_that_claims_too_few_bytes_does_not_get_through(fetched, server, content):
    server.claimed_size = len(content) - 100
    fetched.fails("is damaged", str(fetched.part))
    server.claimed_size = None
    fetched()
    assert whole(fetched, content)


def test_flipped_bits_are_found_and_the_next_call_starts_over(fetched, server, content):
    place = content.index(b"\x93NUMPY") + 500
    server.files["/some+tuned/R50+tiny.npz"] = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    fetched.fails("is damaged", "CRC-32", ".npy is wrong")
    assert fetched.part.stat().st_size == len(content)
    server.files["/some+tuned/R50+tiny.npz"] = content
    fetched()
    assert whole(fetched, content) and "starting over" in fetched.notes[0]


@pytest.mark.parametrize("left", [b"PK" + bytes(50_000), b"x" * 1_000_000], ids=["of another file", "longer"])
def test_a_part_of_something_else_is_noticed(fetched, content, left):
    fetched.leave_part(left)
    fetched()
    assert whole(fetched, content) and any("starting over" in note for note in fetched.notes)


def test_a_part_that_is_the_whole_needs_no_byte_more(fetched, content):
    fetched.leave_part(content)
    fetched()
    assert whole(fetched, content) and fetched.progress == []


def test_another_model_is_not_taken_for_the_one_asked_for(fetched, server):
    arrays = dict(gen_npz.weights("tiny", "imagenet21k+imagenet2012"))
    arrays |= {"head/kernel": np.zeros((32, 11), np.float32), "head/bias": np.zeros(11, np.float32)}
    server.files["/some+tuned/R50+tiny.npz"] = npz(arrays)
    fetched.fails("with 11 classes", "not custom:", "with 10 classes")


def test_what_is_there_already_is_not_fetched_again_and_nothing_else_is_overwritten(fetched, server, content):
    fetched()
    num_requests = len(server.requests)
    assert fetched() == fetched.target and len(server.requests) == num_requests and "already" in fetched.notes[-1]
    fetched.target.write_bytes(b"mine")
    with pytest.raises(UsageError) as failed:
        fetched()
    assert "exists, and is not some+tuned/tiny" in str(failed.value) and fetched.target.read_bytes() == b"mine"


def test_two_processes_do_not_write_one_file(fetched):
    fetched.leave_part(b"PK")
    with fetched.part.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        fetched.fails("another process")
    assert fetched.part.read_bytes() == b"PK"


def test_a_directory_that_cannot_be_is_said(fetched, tmp_path):
    (tmp_path / "out").write_text("a file")
    fetched.fails("cannot be written")


def tool(*arguments):
    command = [sys.executable, "tools/fetch_weights.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_tool_fetches_and_says_what_is_next(server, tmp_path):
    weights = find_weights("augreg+imagenet2012/ViT-Ti_16")  # the smallest: 22 MiB
    layout = google_layout(get_spec(weights.model), 1 + 24 * 24, 1000, None)
    server.files[f"/{weights.path}"] = npz({array.key: np.zeros(array.shape, np.float32) for array in layout})
    done = tool(weights.name, tmp_path / "deep" / "er", "--from", f"{server.address}/")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "deep" / "er" / weights.file_name
    assert path.read_bytes() == server.files[f"/{weights.path}"]
    for said in (f"{path}: ViT-Ti_16, 384 px, 1000 classes, 5,790,376 parameters", f"evaluate.py --weights {path}"):
        assert said in done.stdout


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["ViT-B_16", "--from", "http://127.0.0.1:9"], 4, "Connection refused"),
        (["ViT-B16"], 2, 'did you mean "ViT-B_16"'),
        ([], 2, "--list"),
        (["ViT-B_16", "--from", "ftp://mirror"], 2, "no http or https"),
        (["ViT-B_16", "pyproject.toml"], 2, "is no directory"),
        (["ViT-B_16", "--form", "x"], 2, 'did you mean "--from"'),
    ],
)
def test_mistakes_have_their_exit_code_and_one_message(tmp_path, arguments, code, said):
    failed = tool(*[*arguments[:1], tmp_path, *arguments[1:]] if "--from" in arguments and code == 4 else arguments)
    assert failed.returncode == code and said in failed.stderr and "Traceback" not in failed.stderr, failed.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_list_shows_every_file_and_needs_no_torch():
    check = (
        "import runpy, sys; sys.argv = ['fetch_weights.py', '--list']\n"
        "try: runpy.run_path('tools/fetch_weights.py', run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split()[-1] == "False", done.stderr
    for weights in PUBLISHED.values():
        assert re.search(rf"^{re.escape(weights.name)} .*{weights.num_parameters:,}", done.stdout, re.MULTILINE)
