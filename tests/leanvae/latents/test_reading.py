"""Reading of a store: items, orders that resume, shares of ranks and workers, and latents encoded on the fly."""

import json
import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from leanvae import load_vae
from leanvae.latents import LatentClips, OnlineLatents, ShapeBatches
from leanvae.latents.clips import ClipRule
from leanvae.latents.encode import encode_clips
from leanvae.latents.reading import shape_batches
from leanvae.latents.store import Store, StoreError
from litevae.errors import InvalidInput

RULE = ClipRule(frames=5, every=4, resolutions=("32x32",))


def test_items_are_samples_of_the_posterior(store):
    clips, modes = LatentClips(store), LatentClips(store, mode=True)
    assert len(clips) == 5
    posterior = clips.posterior(2)
    assert torch.equal(modes[2]["latent"], posterior.mean[0])
    draws = torch.stack([clips[epoch, 2]["latent"] for epoch in range(300)])
    error = (draws.mean(0) - posterior.mean[0]) / posterior.std[0]
    assert error.abs().max() < 5 / 300**0.5
    assert torch.equal(clips[7, 2]["latent"], LatentClips(store)[7, 2]["latent"])
    assert not torch.equal(clips[2]["latent"], clips[2]["latent"])
    item = clips[2]
    assert item["size"].tolist() == [5, 32, 32]
    assert (item["fps"], item["caption"], item["flipped"]) == (25.0, "", False)
    assert clips.facts(2)["key"] == item["key"] == clips[-3]["key"]
    with pytest.raises(IndexError, match="index 5: the store holds"):
        clips[5]


def test_flips_are_the_encoded_mirror_images(store, clips, make_job, tmp_path):
    flipping = LatentClips(store, mode=True, flip=True)
    seen = {False: 0, True: 0}
    for epoch in range(20):
        item = flipping[epoch, 0]
        seen[item["flipped"]] += 1
        assert torch.equal(item["latent"], flipping.posterior(0, item["flipped"]).mean[0])
    assert min(seen.values()) > 2
    encode_clips([f"{clips}/b.mp4"], tmp_path / "plain", make_job())
    with pytest.raises(ValueError, match="holds no mirror images"):
        LatentClips(tmp_path / "plain", flip=True)


def test_normalized_items_have_the_statistics_of_a_normal_distribution(store):
    clips = LatentClips(store, normalize=True)
    latents = torch.cat([clips[epoch, index]["latent"].flatten(1) for index in range(5) for epoch in range(200)], dim=1)
    assert latents.mean(1).abs().max() < 0.03
    assert (latents.std(1) - 1).abs().max() < 0.03


def keys(items):
    return [item["key"] for item in items]


def test_epochs_are_shuffled_shared_out_and_resumed(store):
    clips = LatentClips(store, seed=3)
    epochs = [keys(clips) for _ in range(6)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    shares = [keys(LatentClips(store, seed=3, rank=rank, world_size=2)) for rank in range(2)]
    assert [len(share) for share in shares] == [3, 2]
    assert shares[0] == epochs[0][::2]
    assert shares[1] == epochs[0][1::2]
    resumed = LatentClips(store, seed=3)
    iterator = iter(clips)  # the seventh epoch
    first = [next(iterator)["key"] for _ in range(2)]
    resumed.load_state_dict(clips.state_dict())
    assert first + keys(resumed) == keys(LatentClipsAt(store, 6))


def LatentClipsAt(store, epoch):
    clips = LatentClips(store, seed=3)
    clips.epoch = epoch
    return clips


LOADERS = [{"num_workers": 0}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}]


@pytest.mark.parametrize("options", LOADERS)
def test_plain_loaders_draw_new_samples_each_epoch(store, options):
    loader = DataLoader(LatentClips(store), shuffle=True, batch_size=2, collate_fn=list, **options)
    epochs = [[item for batch in loader for item in batch] for _ in range(3)]
    latents = [{item["key"]: item["latent"] for item in epoch} for epoch in epochs]
    assert all(
        len(epoch) == 5 and drawn.keys() == latents[0].keys() for epoch, drawn in zip(epochs, latents, strict=True)
    )
    for key in latents[0]:
        assert not any(torch.equal(latents[a][key], latents[b][key]) for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("options", LOADERS)
def test_plain_loaders_draw_new_flips_each_epoch(store, options):
    loader = DataLoader(LatentClips(store, flip=True), shuffle=True, batch_size=None, **options)
    epochs = [{item["key"]: item["flipped"] for item in loader} for _ in range(5)]
    assert any(epoch != epochs[0] for epoch in epochs)


@pytest.mark.parametrize("options", [{"batch_size": 2}, {"batch_size": 2, "num_workers": 1}, {"batch_size": None}])
def test_plain_loaders_of_several_ranks_are_refused(store, options):
    clips = LatentClips(store, rank=1, world_size=2)
    with pytest.raises(InvalidInput, match=r"2 ranks would all read all clips.*ShapeBatches"):
        list(DataLoader(clips, shuffle=True, **options))
    assert clips[0, 2]["key"] == LatentClips(store)[2]["key"]


def test_distributed_samplers_may_share_the_clips_out(store):
    clips = LatentClips(store, rank=0, world_size=1)
    samplers = [DistributedSampler(clips, 2, rank, shuffle=True) for rank in range(2)]
    shares = [keys(DataLoader(clips, sampler=sampler, batch_size=None)) for sampler in samplers]
    assert sorted(set(shares[0] + shares[1])) == sorted(clips.facts(index)["key"] for index in range(5))


class Iterated(torch.utils.data.IterableDataset):
    """Hands the iterable to a loader's workers."""

    def __init__(self, clips):
        self.clips = clips

    def __iter__(self):
        return iter(self.clips)


def ordered(items):
    return sorted((item["key"], item["latent"].sum().item()) for item in items)


@pytest.mark.parametrize("options", LOADERS)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_iterations_in_workers_go_from_epoch_to_epoch(store, options, num_ranks):
    ranks = [LatentClips(store, rank=rank, world_size=num_ranks) for rank in range(num_ranks)]
    loaders = [DataLoader(Iterated(clips), batch_size=None, **options) for clips in ranks]
    whole = LatentClips(store)
    for epoch in range(3):
        assert [clips.epoch for clips in ranks] == [epoch] * num_ranks
        assert ordered(item for loader in loaders for item in loader) == ordered(whole), epoch
    assert ranks[0].state_dict() == {"epoch": 3, "position": 0}


@pytest.mark.parametrize("options", LOADERS)
def test_iterations_in_workers_resume_once(store, options):
    clips, whole = LatentClips(store), LatentClips(store)
    for data in (clips, whole):
        data.load_state_dict({"epoch": 4, "position": 2})
        data.epoch = 4  # as a loop over epochs says; it goes on in the middle all the same
    loader = DataLoader(Iterated(clips), batch_size=None, **options)
    resumed = ordered(loader)
    assert (len(resumed), resumed) == (3, ordered(whole))
    assert (clips.epoch, ordered(loader)) == (5, ordered(whole))
    clips.epoch = whole.epoch = 1
    assert [ordered(loader) for _ in range(2)] == [ordered(whole) for _ in range(2)]


def test_workers_that_start_late_are_in_the_same_epoch(store):
    """The first worker has yielded its share and finished before the second one begins."""
    loader = DataLoader(Iterated(LatentClips(store)), batch_size=None, num_workers=2, worker_init_fn=begin_late)
    assert ordered(loader) == ordered(LatentClips(store))


def begin_late(worker):
    time.sleep(2 * worker)


def test_batches_have_one_shape_and_resume(clips, make_job, tmp_path):
    encode_clips([str(clips)], tmp_path / "store", make_job(ClipRule(frames=3)))
    data = LatentClips(tmp_path / "store")
    assert len(set(data.shapes)) == 2
    batches = ShapeBatches(data, batch_size=2)
    epoch = list(batches)
    assert len(epoch) == len(batches)
    assert batches.epoch == 1
    assert {index for batch in epoch for _, index in batch} == set(range(len(data)))
    assert all(len({data.shapes[index] for _, index in batch}) == 1 for batch in epoch)
    loaded = list(DataLoader(data, batch_sampler=ShapeBatches(data, batch_size=2)))
    assert [batch["key"] for batch in loaded] == [[data[key]["key"] for key in batch] for batch in epoch]
    iterator = iter(ShapeBatches(data, batch_size=2))
    begun = [next(iterator) for _ in range(2)]
    resumed = ShapeBatches(data, batch_size=2)
    resumed.load_state_dict({"epoch": 0, "position": 2})
    assert begun + list(resumed) == epoch
    ranks = [LatentClips(tmp_path / "store", rank=rank, world_size=2) for rank in range(2)]
    together = [a + b for a, b in zip(*(ShapeBatches(rank, batch_size=1) for rank in ranks), strict=True)]
    assert together == epoch


def test_loops_over_shape_batches_may_be_left_at_any_batch(store):
    clips = LatentClips(store)
    second = ShapeBatches(clips, batch_size=2)
    second.epoch = 1
    second = list(second)
    for last in range(len(second)):
        batches = ShapeBatches(clips, batch_size=2)
        first = list(islice(batches, last + 1))
        resumed = ShapeBatches(clips, batch_size=2)
        resumed.load_state_dict(batches.state_dict())
        rest = list(resumed)
        assert first + rest == list(ShapeBatches(clips, batch_size=2)) + second * (last + 1 == len(second))
        batches.epoch = 1  # as a loop over epochs says
        assert batches.state_dict() == {"epoch": 1, "position": 0}
        assert list(batches) == second


def test_shape_batches_hold_each_clip_once_but_for_filling_up():
    buckets = [np.arange(7), np.arange(7, 8), np.arange(8, 20)]
    for epoch in range(3):
        batches = shape_batches(buckets, 4, seed=1, epoch=epoch)
        counts = Counter(np.concatenate(batches).tolist())
        assert set(counts) == set(range(20))
        assert all(counts[index] == 1 for index in range(8, 20))
        assert sum(counts[index] for index in range(7)) == 8
        assert counts[7] == 4


def test_latents_on_the_fly_are_not_for_workers(stored_clips, checkpoint):
    online = OnlineLatents(str(stored_clips), load_vae(checkpoint), RULE)
    with pytest.raises(InvalidInput, match="num_workers=0"):
        list(DataLoader(Iterated(online), batch_size=None, num_workers=1))


def test_constant_channels_are_not_normalized(store):
    statistics = json.loads((store / "statistics.json").read_text())
    statistics["std"][2] = 0.0
    (store / "statistics.json").write_text(json.dumps(statistics))
    with pytest.raises(StoreError, match="channel 2 is constant"):
        LatentClips(store, normalize=True)


def test_stores_that_are_none_are_refused(tmp_path):
    with pytest.raises(StoreError, match=r"not a latent store: store\.json is missing"):
        LatentClips(tmp_path)


def test_running_stores_can_be_read(store):
    (store / "index.parquet").unlink()
    assert len(LatentClips(store)) == 5


def test_latents_on_the_fly_are_those_of_the_store(store, stored_clips, checkpoint):
    vae = load_vae(checkpoint)
    online = OnlineLatents(str(stored_clips), vae, RULE, mode=True, num_workers=1)
    items = {item["key"]: item for item in online}
    data = LatentClips(store, mode=True)
    assert items.keys() == {data.facts(index)["key"] for index in range(5)}
    for item in data:
        other = items[item["key"]]
        assert item.keys() == other.keys()
        torch.testing.assert_close(item["latent"], other["latent"], rtol=1e-3, atol=1e-3)
        assert all(item[name] == other[name] for name in ("fps", "source", "caption"))
        assert torch.equal(item["size"], other["size"])
    assert Store(store).index().num_rows == 5


def test_latents_on_the_fly_can_be_augmented(stored_clips, checkpoint):
    vae = load_vae(checkpoint)

    def brighten(frames, generator):
        return np.clip(frames.astype(int) + generator.integers(20, 60), 0, 255).astype(np.uint8)

    def run(**fields):
        online = OnlineLatents(f"{stored_clips}/b.mp4", vae, RULE, mode=True, num_workers=1, seed=2, **fields)
        return [{item["key"]: item for item in online} for _ in range(2)]

    plain, again = run()
    assert all(torch.equal(plain[key]["latent"], again[key]["latent"]) for key in plain)
    first, second = run(augment=brighten, flip=True)
    assert all(not torch.equal(plain[key]["latent"], first[key]["latent"]) for key in plain)
    assert all(not torch.equal(first[key]["latent"], second[key]["latent"]) for key in plain)
    assert torch.equal(first[min(plain)]["latent"], run(augment=brighten, flip=True)[0][min(plain)]["latent"])
