"""Files of KV blocks with bytes that nobody saved: an error that says so, or the right rows."""

import random
import time
import warnings

import pytest
from prefixes import assert_rows, layout_of, publish

from pagealloc import CacheFileError
from pagealloc.kv import KVCache
from pagealloc.kv.cache_description import options_of
from pagealloc.kv.cache_file import HEADER, CacheFile, Header, checksum

PROMPTS = [[1] * 16, [1] * 8 + [2] * 8, [3] * 12]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "prompts.kv"
    with KVCache(layout_of()) as cache:
        for prompt in PROMPTS:
            publish(cache, prompt)
        cache.save(path)
    return path


def some_bytes(rng):
    kind = rng.randrange(4)
    if kind == 0:
        return rng.randbytes(rng.randrange(1, 64))
    if kind == 1:
        return bytes([rng.choice([0, 255, 127, 128])]) * rng.randrange(1, 17)
    number = rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
    return number.to_bytes(8, "little")[: rng.choice([4, 8])]


def overwrite(rng, data, end):
    """Change bytes before `end`, mostly where there is much to get wrong."""
    for _ in range(rng.randrange(1, 4)):
        new = some_bytes(rng)
        at = rng.randrange(max(1, min(end, len(data)) - len(new)))
        data[at : at + len(new)] = new


def forge(rng, data, index):
    """Change header or index, with checksums that fit: only the limits are left to notice it."""
    size = HEADER.size
    header = Header._make(
        [*HEADER.unpack(data[:size])[3:-1], bytes(data[size:][: index[0] - size])]
    )
    header = header._replace(description=header.description.rstrip(b"\0"))
    kind = rng.randrange(3)
    if kind == 0:
        description = bytearray(header.description)
        at = rng.randrange(len(description))
        description[at : at + rng.randrange(3)] = rng.choice(
            [b"0", b"-1", b"null", b"1e999", b"9" * 30, b'"', b"[]", b"{", b"true", b"\xff"]
        )
        header = header._replace(description=bytes(description))
    elif kind == 1:
        field = rng.choice(Header._fields[:6])
        limit = 2**32 if field in ("block_tokens", "n_blocks") else 2**64
        value = rng.choice([0, 1, 3, 4, 5, 4096, 2**16, 2**31, 2**32 - 1, 2**50, 2**63])
        header = header._replace(**{field: value % limit})
    else:
        overwrite(rng, data, 0)
        start, end = index
        part = bytearray(data[start:end])
        overwrite(rng, part, len(part))
        data[start:end] = part[: end - start]
        header = header._replace(index_checksum=checksum([data[start:end]]))
    packed = header.pack()
    data[: len(packed)] = packed


def test_changed_files(path, duration_s):
    """Until time is up; each file is tried as it is, and with its damaged blocks skipped."""
    whole = path.read_bytes()
    with CacheFile(path) as file:
        start = file.header.index_offset
        index = (start, start + file.records.nbytes)
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    n_refused = n_usable = 0
    end_s = time.monotonic() + duration_s
    while time.monotonic() < end_s:
        data = bytearray(whole)
        match rng.randrange(4):
            case 0:
                overwrite(rng, data, rng.choice([HEADER.size, index[1], len(data)]))
            case 1:
                del data[rng.randrange(len(data)) :]
            case 2:
                at = rng.randrange(len(data))
                data[at:at] = some_bytes(rng)
            case 3:
                forge(rng, data, index)
        path.write_bytes(data)
        for on_error in ("raise", "skip"):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)
                    use(path, on_error)
                n_usable += 1
            except CacheFileError:
                n_refused += 1
            except BaseException as error:
                path.with_suffix(".failed").write_bytes(data)
                raise AssertionError(f"seed {seed}, {path.with_suffix('.failed')}") from error
    print(f"{n_refused} refused, {n_usable} usable")
    assert n_refused
    assert n_usable


def use(path, on_error):
    with CacheFile(path) as file:
        options_of(file.header.description, file.path)
    with KVCache.load(path, layout_of(), on_error=on_error) as cache:
        for prompt in PROMPTS:
            with cache.sequence(prompt) as seq:
                assert_rows(seq, prompt[: seq.n_cached])
        cache.check()
