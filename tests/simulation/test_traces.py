"""Trace files as their makers write them, and as they come broken."""

import numpy as np
import pytest

from fastserve_jax.errors import ConfigError
from fastserve_jax.simulation.traces import read_trace

AZURE = (
    b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    b"2023-11-16 23:59:59.6805900,374,44\r\n"
    b"2023-11-17 00:00:01.1805910,0,109\r\n"
    b"2023-11-17 00:00:02.6805900,879,0\r\n"
    b"2023-11-17 00:00:03.6805900,91,16"  # as it is published, without a last newline
)
MOONCAKE = (
    b'{"timestamp": 500, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}\n'
    b'{"timestamp": 3000, "input_length": 513, "output_length": 7, "hash_ids": [0, 9]}\n'
)


def written(folder, content, name="trace.any"):
    path = folder / name
    path.write_bytes(content)
    return path


def test_azure(tmp_path):
    trace = read_trace(written(tmp_path, AZURE))
    assert trace.name == "trace"
    assert trace.arrival_s.tolist() == pytest.approx([0.0, 1.5, 4.0], abs=1e-5)
    assert trace.prompt_tokens.tolist() == [374, 1, 91]  # no prompt is empty
    assert trace.output_tokens.tolist() == [44, 109, 16]
    assert trace.dropped == 1
    assert trace.timed
    assert trace.clients is None
    assert trace.blocks is None


def test_azure_of_2024_has_a_time_zone(tmp_path):
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    text += "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01.009930+00:00,2399,6\n"
    assert read_trace(written(tmp_path, text.encode())).arrival_s.tolist() == [0.0, 1.0]


def test_mooncake(tmp_path):
    trace = read_trace(written(tmp_path, MOONCAKE))
    assert trace.arrival_s.tolist() == [0.0, 2.5]
    assert trace.prompt_tokens.tolist() == [1100, 513]
    assert trace.blocks == ((0, 1, 2), (0, 9))
    a, b = (request.prompt for _, request in trace.arrivals(10_000))
    assert a[:512] == b[:512]
    assert a[512] != b[512]


def test_servegen(tmp_path):
    text = b"t_s,client,input_tokens,output_tokens\n0.023,17,448,5\n0.025,23,29,6\n"
    trace = read_trace(written(tmp_path, text))
    assert trace.arrival_s.tolist() == pytest.approx([0.0, 0.002])
    assert trace.clients == ("17", "23")
    assert trace.output_tokens.tolist() == [5, 6]


def test_burstgpt(tmp_path):
    text = b"Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    text += b"5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,10,0,10,API log\n"
    text += b"118,ChatGPT,1087,230.0,1317,Conversation log\n\n"
    trace = read_trace(written(tmp_path, text))
    assert trace.arrival_s.tolist() == [0.0, 113.0]
    assert trace.output_tokens.tolist() == [18, 230]
    assert trace.dropped == 1


def test_milliseconds_and_disorder(tmp_path):
    text = b"\xef\xbb\xbfarrival_ms,prompt_len,output_len\n3000,1,7\n1000,2,8\n3000,3,9\n"
    trace = read_trace(written(tmp_path, text))
    assert trace.arrival_s.tolist() == [0.0, 2.0, 2.0]
    assert trace.prompt_tokens.tolist() == [2, 1, 3]  # ties as they stand


def test_lengths_alone_get_arrivals_by_seed(tmp_path):
    path = tmp_path / "lengths.npy"
    np.save(path, np.array([[3, 4], [0, 5], [7, 0], [8, 9]], np.int32))
    trace, other = read_trace(path, seed=1), read_trace(path, seed=2)
    assert trace.prompt_tokens.tolist() == [3, 1, 8]
    assert trace.output_tokens.tolist() == [4, 5, 9]
    assert trace.dropped == 1
    assert not trace.timed
    assert (trace.arrival_s == read_trace(path, seed=1).arrival_s).all()
    assert (trace.arrival_s[1:] != other.arrival_s[1:]).all()


def test_seeds_choose_windows_and_shuffle_nothing(tmp_path):
    rows = "".join(f"{i},{i + 1},{i + 1}\n" for i in range(10))
    path = written(tmp_path, b"time,input_tokens,output_tokens\n" + rows.encode())
    windows = [read_trace(path, seed, 4) for seed in range(4)]
    assert windows[0].prompt_tokens.tolist() == [1, 2, 3, 4]
    assert windows[1].prompt_tokens.tolist() == [5, 6, 7, 8]
    assert windows[1].arrival_s.tolist() == [0.0, 1.0, 2.0, 3.0]
    for late in windows[2:]:  # beyond the end: somewhere, in order
        assert np.diff(late.prompt_tokens).tolist() == [1, 1, 1]
    assert len(read_trace(path, 3, 10)) == len(read_trace(path, 3)) == 10


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "line 1: no column like 'timestamp'"),
        (b"1,2,3\n4,5,6\n", "line 1: no column like 'timestamp'"),
        (b"time,input_tokens\n1,2\n", "no column like 'output_tokens'"),
        (b"time,output_tokens\n1,2\n", "no column like 'input_tokens'"),
        (b"time,input_tokens,output_tokens\n1,2,3\n1,2\n", "line 3: 2 fields"),
        (b"time,input_tokens,output_tokens\nsoon,2,3\n", "line 2: 'soon' is no time"),
        (b"time,input_tokens,output_tokens\nnan,2,3\n", "line 2: 'nan' is no time"),
        (b"time,input_tokens,output_tokens\n1,-2,3\n", "line 2: '-2' is no number of tokens"),
        (b"time,input_tokens,output_tokens\n1,2.5,3\n", "'2.5' is no number of tokens"),
        (b"time,input_tokens,output_tokens\n1,2,1e12\n", "'1e12' is no number of tokens"),
        (b"time,input_tokens,output_tokens\n1,2,0\n", "no row asks for output"),
        (b"time,input_tokens,output_tokens\n", "no row asks for output"),
        (b"time,input_tokens,output_tokens\n1,2," + b"9" * 200_000, "line 1: field larger"),
        (b"\xff\xfe\x00binary", "neither CSV, JSON lines nor .npy"),
        (MOONCAKE + b"{oops}\n", "line 3"),
        (MOONCAKE + b"\n\n[1]\n", "line 5"),
        (b'{"timestamp": 1, "input_length": 3}\n', "missing required field `output_length`"),
        (b'{"timestamp": 1, "input_length": -3, "output_length": 1}\n', "line 1"),
        (b'{"timestamp": 1, "input_length": 3, "output_length": "1"}\n', "line 1"),
        (b"\x93NUMPY\x01\x00garbage", "not a whole .npy"),
    ],
)
def test_broken_files_name_the_place(tmp_path, content, said):
    path = written(tmp_path, content)
    with pytest.raises(ConfigError) as raised:
        read_trace(path)
    assert said in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((3, 3), np.int32), "shape (3, 3)"),
        (np.zeros(4, np.int32), "shape (4,)"),
        (np.zeros((3, 2), np.float32), "an array of float32"),
        (np.array([[1, -1]]), "token counts are 0 to"),
        (np.array([[1, 2**40]]), "token counts are 0 to"),
    ],
)
def test_arrays_that_are_no_lengths(tmp_path, array, said):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ConfigError) as raised:
        read_trace(tmp_path / "x.npy")
    assert said in str(raised.value)


def test_pickles_are_never_opened(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.array([[1, {}]], object), allow_pickle=True)
    with pytest.raises(ConfigError):
        read_trace(path)


def test_a_header_that_promises_more_than_there_is(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((4, 2), np.int64))
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"(4, 2), }", b"(4000000000, 2), }")[: len(whole)])
    with pytest.raises(ConfigError, match="not a whole"):
        read_trace(path)


@pytest.mark.parametrize("name", ["absent.csv", "."])
def test_no_such_file(tmp_path, name):
    with pytest.raises(ConfigError, match="--trace wants a file"):
        read_trace(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("azure2023_conv.csv", 19_366),
        ("mooncake_conversation.jsonl", 12_031),
        ("servegen_m_mid_1h_5rps.csv", 18_015),
        ("sharegpt_first_turn_lengths.npy", 17_400),
    ],
)
def test_the_recorded_traces(shared, name, rows):
    trace = read_trace(shared(f"traces/{name}"))
    assert len(trace) + trace.dropped == rows
    assert (np.diff(trace.arrival_s) >= 0).all()
    assert trace.prompt_tokens.min() >= 1
    assert trace.output_tokens.min() >= 1
