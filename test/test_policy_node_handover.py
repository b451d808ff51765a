"""What policy_node knows of the player: seconds left, delay, actions that will have been executed."""

from types import SimpleNamespace

import numpy as np
import pytest

from pi0_ros.msg import PlayerStatus
from pi0_ros.ros.conversions import SECOND, actions_from, chunk_actions, chunk_message, to_stamp
from pi0_ros.ros.handover import Handover, Published

MS = 1_000_000
NOW = 1_000 * SECOND


def status(now=NOW, **fields) -> PlayerStatus:
    message = PlayerStatus(**{"state": PlayerStatus.PLAYING, "sequence": 7, "epoch": 1, **fields})
    message.header.stamp = to_stamp(now)
    return message


def published(at=NOW, sequence=7, epoch=1, prompt="go") -> Published:
    actions = np.stack([np.arange(10.0), -np.arange(10.0)], axis=1)
    return Published(sequence, epoch, prompt, at, at, actions, 0.1)


def test_actions_of_a_chunk_at_other_times_are_interpolated_and_end_with_it():
    actions = published().actions
    rows = actions_from(actions, NOW, 0.1, NOW + 250 * MS, 3)
    np.testing.assert_allclose(rows, [[2.5, -2.5], [3.5, -3.5], [4.5, -4.5]], atol=1e-6)
    assert len(actions_from(actions, NOW, 0.1, NOW + 850 * MS, 3)) == 1
    assert actions_from(actions, NOW, 0.1, NOW + 950 * MS, 3).shape == (0, 2)
    assert actions_from(actions, NOW, 0.1, NOW - 1, 3).shape == (0, 2)


def test_committed_is_what_the_last_chunk_commands_for_the_measured_delay_and_what_it_would_do_then():
    handover = Handover()
    handover.published(published())
    handover.heard(status(handover_delay=1.3), NOW)
    committed = handover.committed(NOW + 250 * MS, NOW + 250 * MS, 1, "go")
    # Taken over at 1.3 actions, between the second and the third: three rows stand.
    np.testing.assert_allclose(committed.executed, [[2.5, -2.5], [3.5, -3.5], [4.5, -4.5]], atol=1e-6)
    np.testing.assert_allclose(committed.following[:, 0], [5.5, 6.5, 7.5, 8.5], atol=1e-6)


@pytest.mark.parametrize(("delay", "kept"), [(0.7, 2), (1.0, 2), (1.3, 3), (20.0, 9)])
def test_what_is_committed_is_the_delay_and_one_more_but_never_a_whole_chunk(delay, kept):
    handover = Handover()
    handover.published(published())
    handover.heard(status(handover_delay=delay), NOW)
    committed = handover.committed(NOW, NOW, 1, "go")
    assert (len(committed.executed), len(committed.following)) == (kept, 10 - kept)


def test_another_prompt_leaves_the_committed_actions_and_nothing_after_them():
    handover = Handover()
    handover.published(published())
    handover.heard(status(handover_delay=1.3), NOW)
    committed = handover.committed(NOW + 200 * MS, NOW + 200 * MS, 1, "stop")
    np.testing.assert_allclose(committed.executed[:, 0], [2, 3, 4], atol=1e-6)
    assert committed.following.shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "epoch", "later"),
    [
        ({}, 2, 200),
        ({"state": PlayerStatus.HOLDING}, 1, 200),
        ({"state": PlayerStatus.APPROACHING}, 1, 200),
        ({"state": PlayerStatus.STOPPED}, 1, 200),
        ({"epoch": 0}, 1, 200),
        ({"sequence": 8}, 1, 200),  # a chunk of somebody else
        ({}, 1, 1100),  # silent: gone
        ({}, 1, 950),  # the chunk is over
    ],
)
def test_nothing_is_known_across_epochs_holds_and_silence(change, epoch, later):
    handover = Handover()
    handover.published(published())
    handover.heard(status(handover_delay=1.3), NOW)
    assert handover.committed(NOW + 200 * MS, NOW + 200 * MS, 1, "go") is not None
    handover.heard(status(handover_delay=1.3, **change), NOW)
    assert handover.committed(NOW + later * MS, NOW + later * MS, epoch, "go") is None


def test_the_first_chunk_and_the_time_after_a_reset_are_free():
    handover = Handover()
    assert handover.committed(NOW, NOW, 1, "go") is None
    handover.published(published())
    assert handover.committed(NOW, NOW, 1, "go") is None  # the player has not spoken
    handover.heard(status(handover_delay=1.3), NOW)
    assert handover.delay() == 2
    handover.forget_all()
    assert handover.delay() == 0 and handover.seconds_left(NOW) is None
    handover.heard(status(handover_delay=1.3), NOW)
    assert handover.committed(NOW, NOW, 1, "go") is None  # that chunk is of another time, whatever the player says
    handover.forget_all()
    handover.published(published())
    assert handover.committed(NOW, NOW, 1, "go") is None


def test_a_chunk_that_the_player_does_not_name_was_lost_and_the_one_before_counts():
    handover = Handover()
    handover.published(published())
    handover.heard(status(handover_delay=1.3), NOW)
    newer = published(NOW + 100 * MS, sequence=8)
    handover.published(newer)
    begin = lambda at: handover.committed(NOW + at * MS, NOW + at * MS, 1, "go").executed[0, 0]  # noqa: E731
    assert begin(200) == pytest.approx(1)  # row 1 of the newer one: it is on its way
    handover.heard(status(NOW + 150 * MS, handover_delay=1.3), NOW + 150 * MS)
    assert begin(200) == pytest.approx(1)
    handover.heard(status(NOW + 210 * MS, handover_delay=1.3), NOW + 210 * MS)
    assert begin(300) == pytest.approx(3)  # it never came: row 3 of the old one
    handover.heard(status(NOW + 310 * MS, sequence=8, handover_delay=2.1), NOW + 310 * MS)
    assert begin(400) == pytest.approx(3)  # it did, late: row 3 of the newer


def test_a_refused_chunk_counts_no_more_at_once_and_the_next_one_does():
    handover = Handover()
    handover.published(published())
    handover.heard(status(handover_delay=1.3), NOW)
    handover.published(published(NOW + 100 * MS, sequence=8))
    refusal = {"chunks_refused": 1, "newest_refused": True, "refused_sequence": 8}
    handover.heard(status(NOW + 110 * MS, handover_delay=1.3, **refusal), NOW + 110 * MS)
    assert handover.committed(NOW + 200 * MS, NOW + 200 * MS, 1, "go").executed[0, 0] == pytest.approx(2)
    handover.published(published(NOW + 200 * MS, sequence=9))
    assert handover.committed(NOW + 300 * MS, NOW + 300 * MS, 1, "go").executed[0, 0] == pytest.approx(1)


def test_a_refusal_is_of_the_chunk_it_names_alone():
    handover = Handover()
    handover.published(published())
    handover.heard(status(handover_delay=1.3), NOW)
    handover.published(published(NOW + 100 * MS, sequence=8))
    handover.published(published(NOW + 200 * MS, sequence=9))  # before the player's word on 8 came
    refusal = {"chunks_refused": 1, "newest_refused": True, "refused_sequence": 8}
    handover.heard(status(NOW + 210 * MS, handover_delay=1.3, **refusal), NOW + 210 * MS)
    now = NOW + 300 * MS
    assert handover.committed(now, now, 1, "go").executed[0, 0] == pytest.approx(1)  # row 1 of 9


def test_what_is_played_is_told_of_the_past_that_a_late_camera_shows():
    handover = Handover()
    handover.published(published())
    now = NOW + 1800 * MS
    handover.heard(status(now, handover_delay=1.3), now)
    committed = handover.committed(NOW + 250 * MS, now, 1, "go")
    np.testing.assert_allclose(committed.executed[:, 0], [2.5, 3.5, 4.5], atol=1e-6)
    for silent in (1001, -1001):  # gone, or of another time
        assert handover.committed(NOW + 250 * MS, now + silent * MS, 1, "go") is None


def test_of_a_dry_run_nothing_is_kept():
    """Nobody executes its chunks: one that began with them would begin ever further from where the arm stands."""
    handover = Handover()
    handover.published(published())
    handover.heard(status(state=PlayerStatus.DRY_RUN, handover_delay=1.3), NOW)
    assert handover.delay() == 2 and handover.committed(NOW, NOW, 1, "go") is None


def test_the_delay_is_the_largest_of_the_last_ten_hand_overs_and_never_a_running_maximum():
    handover = Handover()
    handover.heard(status(sequence=1, handover_delay=20.2), NOW)
    assert handover.delay() == 21
    for sequence in range(2, 12):
        for _ in range(3):  # said again and again, it is still one hand-over
            handover.heard(status(sequence=sequence, handover_delay=2.5), NOW)
        assert handover.delay() == (21 if sequence < 11 else 3)
    for sequence, nonsense in ((12, float("nan")), (13, float("inf"))):
        handover.heard(status(sequence=sequence, handover_delay=nonsense), NOW)
        assert handover.delay() == 3


def test_a_chunk_that_came_too_late_to_be_met_counts_for_the_delay():
    handover = Handover()
    handover.heard(status(sequence=1, handover_delay=2.5), NOW)
    handover.heard(status(sequence=2, handover_delay=6.2, state=PlayerStatus.APPROACHING), NOW)
    assert handover.delay() == 7
    handover.heard(status(sequence=3, handover_delay=9.9, state=PlayerStatus.HOLDING), NOW)
    assert handover.delay() == 7


def test_seconds_left_run_down_between_the_players_words():
    handover = Handover()
    assert handover.seconds_left(NOW) is None
    handover.heard(status(seconds_left=0.5), NOW)
    assert handover.seconds_left(NOW + 200 * MS) == pytest.approx(0.3)
    assert handover.seconds_left(NOW + 900 * MS) == 0.0
    assert handover.seconds_left(NOW + 1100 * MS) is None  # silent: gone
    handover.heard(status(state=PlayerStatus.STOPPED), NOW)  # said once, on the change
    assert handover.seconds_left(NOW + 9000 * MS) == 0.0


def test_a_chunk_on_its_way_counts_as_left_for_a_moment():
    handover = Handover()
    handover.published(published(NOW - SECOND, sequence=6))
    handover.heard(status(seconds_left=0.05, sequence=6), NOW)
    handover.published(published(sequence=7))
    assert handover.seconds_left(NOW + 100 * MS) == pytest.approx(0.8)
    handover.heard(status(NOW + 200 * MS, seconds_left=0.6, sequence=7), NOW + 200 * MS)
    assert handover.seconds_left(NOW + 300 * MS) == pytest.approx(0.5)  # by its own word, once it has it
    handover.heard(status(NOW + 600 * MS, seconds_left=0.0, sequence=6), NOW + 600 * MS)
    assert handover.seconds_left(NOW + 600 * MS) == 0.0  # it never took it


def test_a_chunk_message_of_the_wrong_size_is_an_error():
    from pi0_ros.msg import ActionChunk

    message = ActionChunk(sequence=4, joint_names=["a", "b"], horizon=2, actions=[1.0, 2.0, 3.0, 4.0])
    assert chunk_actions(message).tolist() == [[1, 2], [3, 4]]
    message.horizon = 3
    with pytest.raises(ValueError, match="chunk 4: 4 values are not horizon 3 times 2 joints"):
        chunk_actions(message)


def test_a_chunk_message_holds_the_actions_step_by_step_however_they_lie_in_memory():
    robot = SimpleNamespace(name="two", joint_names=("a", "b"), dt=0.05)
    rows = np.array([[0, 2, 4], [1, 3, 5]], np.float32).T  # not contiguous, and not float64
    chunk = SimpleNamespace(actions=rows, prefix_reused=False, cameras_encoded=2, num_steps=10, frozen=1)
    times = {"observed": NOW, "begin": NOW, "end": NOW}
    message = chunk_message(chunk, robot, **times, sequence=7, epoch=2, prompt="go", checkpoint="")
    assert chunk_actions(message).tolist() == [[0, 1], [2, 3], [4, 5]]
