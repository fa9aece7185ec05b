"""A study says what its seeds allow it to say of the paper's optimum, and no more."""

import dataclasses
import json

import numpy as np
import pytest
from fleetcast.evaluation.sensitivity import Grid, Optimum, StaysAbove, Study, render
from scipy import stats

GRID = Grid(
    "heads", "attention heads", "fusion", (1, 2, 4, 8), ("mse", "mape"), Optimum(4), "A paper, Fig. 3"
)
NOISE = np.array([[-0.01, 0.0, 0.01], [0.01, -0.01, 0.0], [0.0, 0.01, -0.01], [0.01, 0.0, -0.01]])
#: What a seed does to all points alike.
SEEDS = np.array([0.5, -0.2, -0.3])


def study(means: dict[float, float], noise: float = 1.0, grid: Grid = GRID, **changes) -> Study:
    values = {
        point: {figure: (mean + noise * of_point).tolist() for figure in grid.figures}
        for (point, mean), of_point in zip(means.items(), NOISE, strict=False)
    }
    given = {"data": "lab", "values": values, "budget": "Few steps.", "seconds": 12.0, "missing": {}}
    return Study(grid, **(given | changes))


@pytest.mark.parametrize(
    ("means", "verdict", "best"),
    [
        ({1: 0.5, 2: 0.4, 4: 0.3, 8: 0.4}, "agrees", 4),
        ({1: 0.5, 2: 0.3, 4: 0.4, 8: 0.4}, "differs", 2),
        ({1: 0.5, 2: 0.300, 4: 0.301, 8: 0.4}, "not told apart", 2),
        ({1: 0.300, 2: 0.301, 4: 0.302, 8: 0.303}, "flat within noise", 1),
        ({1: 0.5, 2: 0.3, 8: 0.4}, "differs", 2),
        ({4: 0.3}, "flat within noise", 4),
    ],
)
def test_the_verdict_is_what_the_seeds_allow(means, verdict, best):
    found = study(means)
    assert (found.verdict, found.best) == (verdict, best)
    assert f"{best} (MSE 0.3" in found.words
    assert "4" in found.words, "the paper's optimum"


def test_large_noise_makes_the_same_means_flat():
    means = {1: 0.5, 2: 0.3, 4: 0.4, 8: 0.4}
    assert study(means, noise=1).verdict == "differs"
    assert study(means, noise=20).verdict == "flat within noise"


def test_one_seed_says_nothing_of_chance():
    found = study(
        {1: 0.5, 4: 0.3}, values={1: {"mse": [0.5], "mape": [0.5]}, 4: {"mse": [0.3], "mape": [0.3]}}
    )
    assert found.verdict == "flat within noise"
    assert found.intervals("mse")[4].width == np.inf
    assert "± " not in render([found], "x").markdown.split("| attention heads")[1]


def test_without_any_noise_a_difference_is_one():
    assert study({1: 0.5, 4: 0.3}, noise=0).verdict == "agrees"
    assert study({1: 0.3, 4: 0.3}, noise=0).verdict == "flat within noise"


def test_of_a_share_explained_the_largest_is_best():
    grid = dataclasses.replace(GRID, figures=("r2", "mse"))
    assert study({1: 0.9, 4: 0.7}, grid=grid).best == 1


def test_what_a_seed_does_to_all_points_is_no_difference_between_them():
    plain = study({1: 0.5, 2: 0.4, 4: 0.3, 8: 0.4})
    shifted = {
        point: {figure: (np.array(of) + SEEDS).tolist() for figure, of in found.items()}
        for point, found in plain.values.items()
    }
    found = dataclasses.replace(plain, values=shifted)
    assert found.verdict == plain.verdict == "agrees"
    for point, interval in found.intervals("mse").items():
        assert interval.width == pytest.approx(plain.intervals("mse")[point].width)


def test_intervals_are_of_what_is_left_between_seeds_pooled_over_the_points():
    found = study({1: 0.5, 2: 0.4, 4: 0.3})
    left = NOISE[:3] - NOISE[:3].mean(0)
    deviation = ((left**2).sum() / 4) ** 0.5  # (3 points − 1) · (3 seeds − 1)
    for point, interval in found.intervals("mse").items():
        assert interval.mean == pytest.approx({1: 0.5, 2: 0.4, 4: 0.3}[point])
        assert interval.width == pytest.approx(stats.t.ppf(0.975, 4) * deviation / 3**0.5)


def test_where_a_trial_is_missing_seeds_are_not_matched():
    values = {1: {"mse": [0.5, 0.52, 0.48]}, 4: {"mse": [0.3, 0.31]}}
    found = study({1: 0.5, 4: 0.3}, values=values, matched=False)
    assert found.noise("mse").freedom == 3
    assert found.verdict == "agrees"


def test_the_page_has_every_point_the_claim_and_what_is_left_out():
    found = study({1: 0.5, 2: 0.4, 4: 0.3}, missing={8: "no such <data>"})
    pages = render([found], "Sensitivity of lab")
    for text in (pages.html, pages.markdown):
        assert "the best is 4 (MSE 0.300), as in the paper: agrees." in text
        assert "8 is left out: no such &lt;data&gt;." in text
        assert "A paper, Fig. 3" in text
        assert "4 (the paper’s best)" in text
        assert "30.0 %" in text
        assert "Few steps. The fits took 12 s in all." in text
    assert set(pages.plots) == {"lab-mse-by-attention-heads.png", "lab-mape-by-attention-heads.png"}
    assert all(image.startswith(b"\x89PNG") for image in pages.plots.values())


LOAD = Grid("load", "load", "stgnn", (1, 2, 3), ("r2",), StaysAbove(2, "r2", 0.9), "A paper, Fig. 4")


@pytest.mark.parametrize(
    ("means", "verdict"),
    [
        ({1: 0.95, 2: 0.93, 3: 0.5}, "agrees"),
        ({1: 0.95, 2: 0.85, 3: 0.5}, "differs"),
        ({1: 0.95, 2: 0.901, 3: 0.5}, "not told apart"),
        ({3: 0.5}, "not told apart"),
    ],
)
def test_a_claim_of_a_floor_is_about_the_points_up_to_the_papers(means, verdict):
    found = study(means, grid=LOAD)
    assert found.verdict == verdict
    assert "the paper’s stays above 0.90 up to 2 and falls beyond" in found.words
    assert f"{means[3]:.3f} at 3" in found.words


def test_a_study_that_was_stored_is_the_same_study():
    found = study(
        {1: 0.5, np.inf: 0.3}, grid=dataclasses.replace(GRID, points=(1, np.inf)), missing={8: "no"}
    )
    saved = json.loads(json.dumps(found.to_json()))
    assert Study.from_json(found.grid, saved) == found
    assert (saved["best"], saved["paper"], saved["verdict"]) == ("inf", "4", "differs")


def test_studies_that_the_data_do_not_allow_are_named():
    page = render([study({1: 0.5, 4: 0.3})], "x", {"requests per second": "needs a metric request_rate"})
    assert "requests per second: left out: needs a metric request_rate." in page.markdown
