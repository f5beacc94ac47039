"""Sources list their clips in a fixed order, say what is wrong with them, and split stably."""

import pytest

from leanvae.config import ConfigError, parse_config
from leanvae.data.config import ClipDataConfig, source_weights
from leanvae.data.sources import Clip, list_items, split_held_out
from leanvae.media.errors import SourceError


@pytest.fixture
def folder(tmp_path):
    for name in ("b.mp4", "a.MOV", "deep/er/c.webm", "deep/notes.txt", ".hidden.mp4", ".trash/d.mp4", "photo.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(clips, folder):
    return [clip.path.removeprefix(f"{folder}/") for clip in clips]


def listed(*sources):
    return list_items(ClipDataConfig(sources=sources))


def test_folders_are_read_recursively_sorted_and_without_hidden_files(folder):
    assert names(listed(str(folder)), folder) == ["a.MOV", "b.mp4", "deep/er/c.webm"]


def test_folders_with_links_in_a_circle_are_read_once(folder):
    (folder / "deep" / "again").symlink_to(folder, target_is_directory=True)
    assert names(listed(str(folder)), folder) == ["a.MOV", "b.mp4", "deep/er/c.webm"]


def test_globs_and_single_files(folder):
    assert names(listed(f"{folder}/*.mp4"), folder) == ["b.mp4"]
    assert names(listed(f"{folder}/**/*.[mw]*"), folder) == ["b.mp4", "deep/er/c.webm"]
    assert names(listed(str(folder / "b.mp4")), folder) == ["b.mp4"]


def test_folders_whose_name_looks_like_a_glob_are_folders(tmp_path):
    (tmp_path / "take [1]").mkdir()
    (tmp_path / "take [1]" / "x.mp4").touch()
    assert len(listed(str(tmp_path / "take [1]"))) == 1


def test_text_lists_are_relative_to_themselves(folder):
    (folder / "list.txt").write_text(f"\ufeffb.mp4\n\n  deep/er/c.webm  \n{folder}/a.MOV\n", encoding="utf-8")
    assert names(listed(str(folder / "list.txt")), folder) == ["b.mp4", "deep/er/c.webm", "a.MOV"]


def test_csv_files_give_parts_and_captions(folder):
    (folder / "parts.csv").write_text('caption,path,start,end\n"a, b",b.mp4,1.5,4\n,b.mp4,,2\n,a.MOV,,\n')
    clips = listed(str(folder), str(folder / "parts.csv"))[3:]
    path = str(folder / "b.mp4")
    assert clips[0] == Clip(path, 1.5, 4.0, "a, b", source=1)
    assert clips[1] == Clip(path, 0.0, 2.0, None, source=1)
    assert clips[2] == Clip(str(folder / "a.MOV"), source=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,start\na.mp4,1\n", r"parts\.csv: a column named 'path' is missing; found \['file', 'start'\]"),
        ("path,start\nb.mp4,soon\n", r"line 2: start: expected seconds, 0 or more, got 'soon'"),
        ("path,start\nb.mp4,-1\n", r"line 2: start: expected seconds, 0 or more, got '-1'"),
        ("path,start,end\nb.mp4,3,3\n", r"line 2: end 3 is not after start 3"),
        ("path,end\nb.mp4,1\n,2\n", r"line 3: the path is empty"),
        ("path\n", r"no clips found"),
    ],
)
def test_csv_mistakes_are_named_with_their_line(folder, content, message):
    (folder / "parts.csv").write_text(content)
    with pytest.raises(SourceError, match=message):
        listed(str(folder / "parts.csv"))


def test_missing_and_empty_sources_are_errors(folder):
    (folder / "empty").mkdir()
    with pytest.raises(SourceError, match="no such file or folder"):
        listed(str(folder / "nowhere"))
    with pytest.raises(SourceError, match="no clips found"):
        listed(str(folder / "empty"))
    with pytest.raises(SourceError, match="no clips found"):
        listed(str(folder / "*.avi"))
    with pytest.raises(SourceError, match=r"expected a \.csv"):
        listed(str(folder / "photo.jpg"))


def test_split_is_by_name_alone_and_stable_when_files_are_added():
    clips = [Clip(f"/data/{n % 7}/clip_{n}.mp4") for n in range(1000)]
    training, held_out = split_held_out(clips, 0.1)
    assert 70 < len(held_out) < 130
    assert sorted(training + held_out, key=clips.index) == clips
    moved = [Clip(clip.path.replace("/data/", "/elsewhere/")) for clip in clips[::2]]
    added = [Clip(f"new_{n}.mp4") for n in range(500)]
    again = {clip.path.rsplit("/")[-1] for clip in split_held_out(added + moved, 0.1)[1]}
    before = {clip.path.rsplit("/")[-1] for clip in held_out}
    assert before & {clip.path.rsplit("/")[-1] for clip in moved} == again - {clip.path for clip in added}
    assert split_held_out(clips, 0.0) == (clips, [])
    grown = split_held_out(clips, 0.2)[1]
    assert set(held_out) <= set(grown)


def test_parts_of_a_file_stand_on_one_side():
    clips = [Clip(f"{n}.mp4", start=part) for n in range(50) for part in (0.0, 1.0)]
    training, held_out = split_held_out(clips, 0.5)
    assert not {clip.path for clip in training} & {clip.path for clip in held_out}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"num_frames": -3}, "num_frames: got -3"),
        ({"resolution": [0, 64]}, "resolution: got .*at least 1 pixel"),
        ({"resolution": [64]}, "resolution"),
        ({"sources": "clips"}, "sources: got 'clips': .*list of paths"),
        ({"sources": []}, "sources"),
        ({"sources": [{"path": "a", "weight": 0}]}, r"sources.0.weight: got 0"),
        ({"sources": [{"path": "a", "weight": 2}, "b"]}, "every source a weight or none; 'b' has none"),
        ({"held_out": 1.0}, "held_out: got 1.0"),
        ({"strides": 2}, "strides: unknown key"),
    ],
)
def test_config_errors_name_the_key_and_the_rule(tree, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(ClipDataConfig, tree, "run.yaml")


def test_config_takes_paths_and_weights_and_survives_its_own_dump():
    config = ClipDataConfig.model_validate({"sources": [{"path": "a", "weight": 2}, {"path": "b", "weight": 1}]})
    assert source_weights(config, [10, 20]) == [2.0, 1.0]
    assert source_weights(ClipDataConfig(sources=["a", "b"]), [10, 20]) == [10.0, 20.0]
    assert ClipDataConfig.model_validate(config.model_dump(mode="json")) == config
    assert ClipDataConfig().sources[0].path == "builtin"
