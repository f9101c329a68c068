"""An owner of prefixes and a client, one of them killed at any moment: the other goes on."""

import os
import random
import select
import signal
import time

from prefixes import assert_rows, compute, layout_of, publish
from processes import child_of, wait_for

from pagealloc.kv import KVCache

SYSTEM = [[9] * 8, [8] * 12]
N_RUNS = 200


def prompt_of(rng):
    tail = [token for token in rng.choices(range(4), k=3) for _ in range(4)]
    return [*rng.choice(SYSTEM), *tail][:24]


def own(path, told, gone, seed):
    """Publish and evict until told that the client is gone, and find nothing of it left."""
    rng = random.Random(seed)
    layout = layout_of()
    cache = KVCache(layout, purge_after_s=0, budget_bytes=60 * layout.block_bytes)
    server = cache.serve(path)
    os.write(told, b"!")
    while not select.select([gone], [], [], 0)[0]:
        publish(cache, prompt_of(rng))
        if not rng.randrange(6):
            cache.prefixes.clear()
    wait_for(lambda: not server.n_clients)
    cache.check()
    cache.prefixes.clear()
    assert cache.stats().committed_bytes == 0
    cache.close()


def use(path, told, seed):
    """Attach, and compare all rows for ever; some time after the owner's death, end well."""
    rng = random.Random(seed)
    client = KVCache.attach(path, purge_after_s=0)
    os.write(told, b"!")
    opened, n_left = [], 40
    while n_left:
        prompt = prompt_of(rng)
        seq = client.sequence(prompt)
        assert_rows(seq, prompt[: seq.n_cached])
        compute(seq, prompt)
        opened.append((seq, prompt))
        if len(opened) > 4:
            old, tokens = opened.pop(rng.randrange(4))
            assert_rows(old, tokens)
            old.close()
        n_left -= not client._remote.is_alive
    for seq, tokens in opened:
        assert_rows(seq, tokens)
        seq.close()
    client.check()
    client.prefixes.clear()
    assert client.stats().committed_bytes == 0
    client.close()


def run_once(path, seed, *, kills_owner):
    """Start both, kill one, and wait for the other to end well."""
    ready, told = os.pipe()
    gone, goes = os.pipe()
    living = set()
    try:
        owner = child_of(own, path, told, gone, seed)
        living.add(owner)
        assert os.read(ready, 1) == b"!"
        client = child_of(use, path, told, seed + 1)
        living.add(client)
        assert os.read(ready, 1) == b"!"
        time.sleep(random.uniform(0.001, 0.03))
        killed, other = (owner, client) if kills_owner else (client, owner)
        os.kill(killed, signal.SIGKILL)
        assert exit_code(killed, living) == -signal.SIGKILL
        os.write(goes, b"!")
        assert exit_code(other, living) == 0
    finally:
        for pid in living:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for each in (ready, told, gone, goes):
            os.close(each)


def exit_code(pid, living):
    """Wait for the end of a child, which lives no longer."""
    ended = []
    wait_for(lambda: ended.append(os.waitpid(pid, os.WNOHANG)) or ended[-1][0], timeout_s=60)
    living.remove(pid)
    return os.waitstatus_to_exitcode(ended[-1][1])


def test_either_is_killed(tmp_path, duration_s):
    """Two hundred times, if some minutes are given; some times otherwise."""
    tmp_path.chmod(0o700)
    end_s = time.monotonic() + duration_s
    n_runs = 0
    while n_runs < 4 or (time.monotonic() < end_s and n_runs < N_RUNS):
        seed = random.randrange(2**32)
        print(f"run {n_runs}, seed {seed}")
        run_once(tmp_path / f"socket{n_runs}", seed, kills_owner=n_runs % 2 == 0)
        n_runs += 1
