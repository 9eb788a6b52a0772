"""The tensor cache: found by content, whole or not there."""

import multiprocessing
import os

import pytest
import torch
from safetensors import SafetensorError

from preference_data.cache import CacheUnusable, TensorCache, cache_key


def test_what_was_put_is_found_again(tmp_path):
    cache, key = TensorCache(tmp_path), cache_key(image="a", size=[64, 64])
    assert cache.get(key) is None and key not in cache
    cache.put(key, torch.arange(6.0).view(2, 3))
    assert key in TensorCache(tmp_path)
    assert torch.equal(TensorCache(tmp_path).get(key), torch.arange(6.0).view(2, 3))


def test_another_model_image_or_size_is_another_entry():
    keys = {cache_key(model=m, image=i, size=s) for m in "ab" for i in "xy" for s in ([1, 2], [2, 1])}
    assert len(keys) == 8 and cache_key(a=1, b=2) == cache_key(b=2, a=1)


def test_a_damaged_entry_is_made_again_and_said(tmp_path, caplog):
    cache, key = TensorCache(tmp_path), cache_key(image="a")
    cache.put(key, torch.ones(100))
    path = cache.path(key)
    path.write_bytes(path.read_bytes()[:200])
    assert cache.get(key) is None
    assert "damaged" in caplog.text and str(path) in caplog.text
    cache.put(key, torch.zeros(2))
    assert torch.equal(cache.get(key), torch.zeros(2))


def test_a_crash_while_writing_leaves_nothing(tmp_path, monkeypatch):
    cache, key = TensorCache(tmp_path), cache_key(image="a")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("preference_data.cache.os.replace", full)
    with pytest.raises(CacheUnusable, match=r"cannot be written \(no space.*pass another folder with --cache_dir"):
        cache.put(key, torch.ones(3))
    assert cache.get(key) is None
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def _fill(folder, number):
    for entry in range(20):
        TensorCache(folder).put(cache_key(entry=entry), torch.full((1000,), float(entry)))


def test_two_processes_may_write_the_same_entries(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_fill, args=(tmp_path, n)) for n in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0, 0]
    for entry in range(20):
        assert torch.equal(TensorCache(tmp_path).get(cache_key(entry=entry)), torch.full((1000,), float(entry)))
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 20


@pytest.mark.parametrize("place", ["/proc/no/such", "/dev/null/x", "file/below"])
def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path, place):
    """Home on a read-only disk, or no home at all, ended in a traceback after the model was loaded."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(CacheUnusable, match=r"the cache .* cannot be written \(.*--cache_dir none"):
        TensorCache(tmp_path / place).check()


def test_entries_can_be_read_by_whoever_shares_the_folder(tmp_path):
    cache = TensorCache(tmp_path)
    before = os.umask(0o002)
    try:
        cache.put("aa", torch.ones(1))
    finally:
        os.umask(before)
    assert cache.path("aa").stat().st_mode & 0o777 == 0o664


def test_a_full_disk_is_told_in_a_sentence(tmp_path, monkeypatch):
    """safetensors raises an error of its own."""

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("preference_data.cache.save_file", full)
    with pytest.raises(CacheUnusable, match="No space left on device"):
        TensorCache(tmp_path).put("aa", torch.ones(1))
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
