import pytest

from ft.recipe import WSD, Constant, Cosine, Linear
from ft.train.schedule import lr_share


def shares(schedule, steps):
    return [round(lr_share(schedule, step, steps), 6) for step in range(steps)]


def test_constant_warms_up_and_holds():
    assert shares(Constant(warmup=2), 4) == [0.5, 1.0, 1.0, 1.0]


def test_linear_falls_towards_its_floor_and_wastes_no_step():
    assert shares(Linear(warmup=0), 4) == [1.0, 0.75, 0.5, 0.25]
    assert shares(Linear(warmup=0, floor=0.2), 4) == [1.0, 0.8, 0.6, 0.4]


def test_warmup_below_one_is_a_share_of_the_run():
    assert shares(Linear(warmup=0.25), 8)[:3] == [0.5, 1.0, 1.0]


def test_cosine_is_half_way_in_the_middle():
    got = shares(Cosine(warmup=0, floor=0.0), 4)
    assert got == [1.0, pytest.approx(0.853553, abs=1e-6), 0.5, pytest.approx(0.146447, abs=1e-6)]
    assert lr_share(Cosine(warmup=0, floor=0.1), 2, 4) == pytest.approx(0.55)


def test_wsd_stays_then_decays():
    assert shares(WSD(warmup=1, decay=2), 6) == [1.0, 1.0, 1.0, 1.0, 1.0, 0.5]
    assert shares(WSD(warmup=2, decay=0.5), 8) == [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("schedule", [Constant(), Linear(), Cosine(), WSD()])
def test_no_step_of_a_run_of_any_length_has_a_rate_of_zero(schedule):
    for steps in (1, 2, 3, 50):
        assert all(0 < share <= 1 for share in shares(schedule, steps))
