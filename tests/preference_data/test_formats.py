"""Every column layout: rows as the public data sets have them, and what is said of those that do not fit."""

import base64

import datasets
import pytest
from preference_files import encoded as png
from preference_files import json_lines, json_list, parquet, picture, save, tar

from preference_data.formats import LAYOUTS, find_layout
from preference_data.images import BadRow
from preference_data.readers import read_preferences
from preference_data.schemas import BestWorst, Pair, Ranked, ReferenceWorst


@pytest.fixture
def folder(tmp_path):
    save(tmp_path, "1.png", "2.png", "3.png", "4.png")  # pictures 1 to 4
    return tmp_path


def which(source) -> int:
    """The number of the picture."""
    return next(n for n in range(1, 9) if source.open().tobytes() == picture(n).tobytes())


def paths(*numbers) -> list[str]:
    return [f"{number}.png" for number in numbers]


def read(folder, *rows, **options) -> list:
    return list(read_preferences(json_lines(folder / "a.jsonl", list(rows)), **options))


def only(folder, row, **options):
    (record,) = read(folder, row, **options)
    return record


# --- Pick-a-Pic v2 ---


def pickapic(label_0, label_1, **others) -> dict:
    row = {"caption": "p", "jpg_0": png(1), "jpg_1": png(2), "label_0": label_0, "label_1": label_1}
    return {**row, "has_label": True, "are_different": True, "model_0": "a", "ranking_id": 3, **others}


def test_pickapic(folder):
    rows = [pickapic(1.0, 0.0), pickapic(0.0, 1.0), pickapic(0.5, 0.5), pickapic(0.25, 0.75)]
    records = read_preferences(parquet(folder / "a.parquet", [*rows, pickapic(1.0, 0.0, has_label=False)]))
    assert records.format == "pickapic"
    found = [(which(pair.chosen), which(pair.rejected), pair.confidence) for pair in records]
    assert found == [(1, 2, 1.0), (2, 1, 1.0), (1, 2, 0.5), (2, 1, 0.75)]
    assert (records.report.rows, records.report.unlabelled, records.report.ties) == (5, 1, 1)


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ((1.0, 1.0), "column 'label_0': the labels 1 and 1 do not add up to 1"),
        ((0.0, 0.0), "column 'label_0': the labels 0 and 0 do not add up to 1"),
        ((2.0, -1.0), "column 'label_0': 2 is out of range: 0 to 1"),
        ((1.0, None), "column 'label_1': expected a number, found nothing"),
        ((float("nan"), 1.0), "column 'label_0': nan is not a finite number"),
    ],
)
def test_a_pickapic_label_out_of_range_is_named(folder, labels, problem):
    file = parquet(folder / "a.parquet", [pickapic(1.0, 0.0), pickapic(*labels)])
    with pytest.raises(BadRow) as caught:
        list(read_preferences(file))
    assert str(caught.value) == f"{file}, row 1, {problem}"


# --- HPDv2 ---


def test_hpdv2(folder):
    rows = [{"prompt": "p", "image_path": paths(1, 2), "human_preference": [0, 1]}]
    rows += [{"prompt": "p", "file_path": paths(3, 4), "human_preference": [1, 1]}]
    records = read_preferences(json_list(folder / "train.json", rows))
    first, tie = records
    assert records.format == "hpdv2"
    assert (which(first.chosen), which(first.rejected), first.confidence) == (2, 1, None)
    assert tie.is_tie
    ranked = only(folder, {"prompt": "p", "image_path": paths(1, 2, 3), "rank": [2, 1.5, 3], "raw_annotations": []})
    assert isinstance(ranked, Ranked) and ranked.scores == [-2, -1.5, -3]
    both = {"prompt": "p", "image_path": paths(1, 2), "rank": [2, 1], "human_preference": []}
    assert only(folder, both).scores == [-2, -1]  # as the loading script fills the column it has not


def test_hpdv2_images_are_found_in_the_folder_of_the_split(folder):
    save(folder / "clone", "train/a.png", "train/b.png")
    json_list(folder / "clone" / "train.json", [{"prompt": "p", "image_path": ["a.png", "b.png"], "rank": [0, 1]}])
    (ranked,) = read_preferences(folder / "clone")
    assert [which(image) for image in ranked.images] == [1, 2]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"human_preference": [2, 0]}, "column 'human_preference'[0]: 2 is out of range: 0 to 1"),
        ({"rank": [1, -1]}, "column 'rank'[1]: -1 is out of range: it must be at least 0"),
        ({"rank": [1]}, "column 'scores': 2 images have 1 scores"),
        ({"rank": "first"}, "column 'rank': expected a list, found str"),
    ],
)
def test_hpdv2_ranks_out_of_range_are_named(folder, row, problem):
    with pytest.raises(BadRow) as caught:
        read(folder, {"prompt": "p", "image_path": paths(1, 2), **row})
    assert str(caught.value) == f"{folder / 'a.jsonl'}, row 0, {problem}"


# --- HPDv3 ---


def test_hpdv3(folder):
    row = {"prompt": "p", "path1": "1.png", "path2": "2.png", "model1": "real", "model2": "sd"}
    assert only(folder, {**row, "confidence": 0.97, "choice_dist": [12, 7]}).confidence == 0.97
    voted = only(folder, {**row, "confidence": None, "choice_dist": [12, 4]})
    assert (which(voted.chosen), voted.confidence, voted.annotators) == (1, 0.75, 16)
    assert only(folder, {**row, "confidence": None}).confidence is None
    with pytest.raises(BadRow, match=r"column 'confidence': 1\.2 is out of range: 0 to 1"):
        only(folder, {**row, "confidence": 1.2})
    with pytest.raises(BadRow, match="column 'choice_dist': expected votes for two images, found 3"):
        only(folder, {**row, "choice_dist": [1, 2, 3]})


# --- ImageRewardDB ---


def image_row(prompt_id, number, rank, **others) -> dict:
    return {"prompt_id": prompt_id, "prompt": prompt_id, "image_path": f"{number}.png", "rank": rank, **others}


def test_imagerewarddb_rows_of_one_prompt_become_one_record(folder):
    rows = [image_row("a", 1, 2), image_row("a", 2, 1), image_row("a", 3, 2), image_row("b", 4, 1)]
    records = read_preferences(json_lines(folder / "a.jsonl", rows))
    first, second = records
    assert records.format == "imagerewarddb"
    assert [which(image) for image in first.images] == [1, 2, 3] and first.scores == [-2, -1, -2]
    assert first.where == f"{folder / 'a.jsonl'}, row 0 to 2" and second.scores == [-1]
    assert (records.report.rows, records.report.records) == (4, 2)


def test_imagerewarddb_images_are_found_one_folder_up_and_by_rating(folder):
    save(folder / "clone", "images/train/train_1/x.webp", "images/train/train_1/y.webp")
    rows = [
        {"prompt_id": 1, "prompt": "p", "image_path": f"images/train/train_1/{name}.webp", "overall_rating": rating}
        for name, rating in (("x", 3), ("y", 7))
    ]
    parquet(folder / "clone" / "metadata-train.parquet", rows)
    parquet(folder / "clone" / "data" / "more-0.parquet", rows)
    for place in ("clone", "clone/data"):
        (record,) = read_preferences(folder / place)
        assert record.scores == [3, 7]
    with pytest.raises(BadRow, match=r"column 'overall_rating'.* 8 is out of range: 1 to 7"):
        only(folder, {"prompt_id": 1, "prompt": "p", "image_path": "1.png", "overall_rating": 8})


def test_imagerewarddb_with_lists(folder):
    record = only(folder, {"id": "x", "prompt": "p", "generations": paths(1, 2), "ranking": [2, 1]})
    assert record.scores == [-2, -1]
    record = only(folder, {"prompt_id": "x", "prompt": "p", "image": paths(1, 2), "rank": [1, 1]})
    assert record.scores == [-1, -1]


def test_imagerewarddb_rows_that_do_not_stand_together_are_named(folder):
    rows = [image_row("a", 1, 1), image_row("b", 2, 1), image_row("a", 3, 2)]
    with pytest.raises(BadRow, match=r"row 2, column 'prompt_id': the rows of 'a' do not follow each other"):
        read(folder, *rows)
    assert [record.prompt for record in read(folder, *rows, on_bad_row="skip")] == ["a", "b"]


def test_a_missing_image_of_a_group_costs_only_itself(folder):
    rows = [image_row("a", 1, 1), image_row("a", 7, 2), image_row("a", 3, 3)]
    (record,) = read(folder, *rows, on_bad_row="skip")
    assert record.scores == [-1, -3]


# --- One's own ---


def test_pairs(folder):
    row = {"prompt": "p", "chosen": "1.png", "rejected": "2.png"}
    pair = only(folder, row)
    assert isinstance(pair, Pair) and (which(pair.chosen), which(pair.rejected)) == (1, 2)
    assert (pair.margin, pair.confidence, pair.annotators) == (None, None, 1)
    scored = only(folder, {**row, "chosen_score": 3, "rejected_score": 1.5, "confidence": 0.75, "annotators": 4})
    assert (scored.margin, scored.confidence, scored.annotators) == (1.5, 0.75, 4)
    assert only(folder, {**row, "chosen_score": 3, "rejected_score": 1.5, "margin": 7}).margin == 7


def test_pairs_from_a_csv_are_text_turned_to_numbers(folder):
    (folder / "a.csv").write_text('caption,images,scores\np,"[""1.png"", ""2.png""]","[1, null]"\n')
    (ranked,) = read_preferences(folder / "a.csv")
    assert ranked.scores == [1, None] and which(ranked.images[1]) == 2
    (folder / "a.csv").write_text("prompt,chosen,rejected,margin,confidence\np,1.png,2.png,0.5,\n")
    (pair,) = read_preferences(folder / "a.csv")
    assert (pair.margin, pair.confidence) == (0.5, None)
    (folder / "a.csv").write_text("prompt,chosen,rejected,margin\np,1.png,2.png,much\n")
    with pytest.raises(BadRow, match="row 0, column 'margin': expected a number, found 'much'"):
        read_preferences(folder / "a.csv")


def test_best_worst_and_reference_worst(folder):
    record = only(folder, {"prompt": "p", "images": paths(1, 2, 3), "best": 2, "worst": 0})
    assert isinstance(record, BestWorst) and (record.best, record.worst) == (2, 0)
    record = only(folder, {"prompt": "p", "reference": "4.png", "images": paths(1, 2), "worst": 1})
    assert isinstance(record, ReferenceWorst) and which(record.reference) == 4
    for worst, problem in (
        (3, "image 3 is out of range: there are 3"),
        (-1, "image -1 is out of"),
        (0.5, "expected the index"),
    ):
        with pytest.raises(BadRow, match=f"row 0, column 'worst': {problem}"):
            only(folder, {"prompt": "p", "images": paths(1, 2, 3), "best": 2, "worst": worst})


def test_tars_of_pairs_and_of_ranked_lists(folder):
    members = [("a.chosen.png", png(1)), ("a.json", {"prompt": "p", "margin": 2}), ("a.rejected.png", png(2))]
    (pair,) = read_preferences(tar(folder / "p.tar", members))
    assert (which(pair.chosen), which(pair.rejected), pair.margin) == (1, 2, 2)
    members = [("a.0.jpg", png(1)), ("a.1.jpg", png(2)), ("a.txt", "p"), ("a.json", {"label_0": 0, "label_1": 1})]
    (pair,) = read_preferences(tar(folder / "k.tar", members))
    assert which(pair.chosen) == 2
    members[-1] = ("a.json", {"scores": [1, 2]})
    (ranked,) = read_preferences(tar(folder / "r.tar", members))
    assert ranked.scores == [1, 2] and [which(image) for image in ranked.images] == [1, 2]


def test_a_data_set_in_memory_with_the_image_feature():
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
    )
    data = {"prompt": ["p"], "chosen": [picture(1)], "rejected": [{"bytes": png(2), "path": None}]}
    (pair,) = read_preferences(datasets.Dataset.from_dict(data, features))
    assert (which(pair.chosen), which(pair.rejected)) == (1, 2)
    assert pair.chosen.where == "the data set, row 0, column 'chosen'"


# --- Telling formats apart ---


def test_every_format_is_found_from_no_more_than_it_needs():
    for name, layout in LAYOUTS.items():
        for pick in (0, -1):  # the first and the last of each column's names
            columns = [names[pick] for names in layout.required]
            if not (name == "hpdv2" and pick == 0):  # there "image_path" is a list; alone it could be either
                assert find_layout(columns, "x").name == name, columns


@pytest.mark.parametrize(
    ("columns", "fragments"),
    [
        (["prompt", "chosen", "reject"], ["nearest one, 'pairs'", "needs the column 'rejected'", "rename 'reject'?"]),
        (["caption", "jpg_0", "jpg_1", "label_0"], ["nearest one, 'pickapic'", "needs the column 'label_1'"]),
        (
            ["prompt", "images", "score"],
            ["needs the column 'scores'", "rename 'score'?", "['prompt', 'images', 'score']"],
        ),
        (["prompt", "path1"], ["nearest one, 'hpdv3'", "'path2'"]),
        (["chosen", "rejected"], ["nearest one, 'pairs'", "needs the column 'prompt' or 'caption' or 'text'"]),
        (["prompt", "image"], ["x holds captioned images, not preferences: read it with read_captioned"]),
    ],
)
def test_columns_that_fit_no_format_name_the_nearest_and_what_it_lacks(columns, fragments):
    with pytest.raises(ValueError) as caught:
        find_layout(columns, "x")
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


def test_a_format_can_be_asked_for(folder):
    row = {"prompt": "p", "images": paths(1, 2), "scores": [1, 2], "best": 0, "worst": 1}
    assert isinstance(only(folder, row), BestWorst)
    assert isinstance(only(folder, row, format="ranked"), Ranked)
    with pytest.raises(
        ValueError, match=r"a\.jsonl does not have the format 'pairs', which needs the column 'chosen' and"
    ):
        only(folder, row, format="pairs")
    with pytest.raises(ValueError, match=r"unknown format 'rankd'\. Did you mean 'ranked'\?$"):
        only(folder, row, format="rankd")


# --- Votes ---


@pytest.mark.parametrize(
    ("winner", "chosen"),
    [
        ("A", "0.png"),
        ("b", "1.png"),
        (" a ", "0.png"),
        ("image_b", "1.png"),
        ("left", "0.png"),
        ("tie", None),
        ("neither", None),
    ],
)
def test_a_table_of_votes_is_read(tmp_path, winner, chosen):
    save(tmp_path, "0.png", "1.png")
    (tmp_path / "v.csv").write_text(f"prompt,image_a,image_b,winner\np,0.png,1.png,{winner}\n")
    records = read_preferences(tmp_path / "v.csv")
    (pair,) = records
    assert records.format == "votes" and pair.is_tie == (chosen is None)
    assert chosen is None or pair.chosen.path.name == chosen


def test_a_vote_may_name_the_column_as_the_file_does(tmp_path):
    """Where --columns renamed the images' columns, no vote that named one of them was understood."""
    save(tmp_path, "0.png", "1.png")
    (tmp_path / "v.csv").write_text("prompt,Ours,base,who\np,0.png,1.png,ours\np,0.png,1.png,base\np,0.png,1.png,b\n")
    columns = {"image_a": "Ours", "image_b": "base", "winner": "who"}
    chosen = [pair.chosen.path.name for pair in read_preferences(tmp_path / "v.csv", columns=columns)]
    assert chosen == ["0.png", "1.png", "1.png"]


def test_a_vote_that_cannot_be_understood_is_named_and_one_that_was_not_given_is_counted(tmp_path):
    save(tmp_path, "0.png", "1.png")
    (tmp_path / "v.csv").write_text("prompt,left,right,vote\np,0.png,1.png,\np,0.png,1.png,C\n")
    with pytest.raises(BadRow, match=r"row 1, column 'vote': expected A, B, a tie or the name of a column, found 'c'"):
        list(read_preferences(tmp_path / "v.csv"))
    records = read_preferences(tmp_path / "v.csv", on_bad_row="skip")
    assert list(records) == [] and records.report.unlabelled == 1 and records.report.bad == 1


def test_a_data_url_is_an_image_and_a_broken_one_is_not_printed_whole(tmp_path):
    """The message was the whole base64 text, megabytes of it."""
    good = [f"data:image/png;base64,{base64.b64encode(png(number)).decode()}" for number in (1, 2)]
    row = {"prompt": "p", "chosen": good[0], "rejected": good[1]}
    (pair,) = read_preferences(json_lines(tmp_path / "a.jsonl", [row]))
    assert pair.chosen.open().size == (8, 6)
    for broken in (
        "data:image/png;base64," + "!" * 5000,
        "data:image/png," + "x" * 5000,
        "A" * 5000,
        "https://x/" + "y" * 5000,
    ):
        with pytest.raises(BadRow) as caught:
            list(read_preferences(json_lines(tmp_path / "b.jsonl", [row | {"chosen": broken}])))
        assert len(str(caught.value)) < 400 + len(str(tmp_path)) and "characters)" in str(caught.value)
