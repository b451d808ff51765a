"""What of a recording belongs together: prompts to their episode, commands to one side of a hole."""

from __future__ import annotations

import bag_kit as kit

from pi0_ros.training.bags import Bag, find_bags
from pi0_ros.training.episodes import Selection, cut_episodes
from pi0_ros.training.recording import read_recording


def at(seconds):
    return kit.START + round(seconds * kit.SECOND)


def cut(path, items, **changes):
    """The episodes of a bag with these messages."""
    robot = kit.robot(**changes)
    (files,) = find_bags(kit.write_bag(path / "bag", items))
    with Bag(files) as bag:
        return cut_episodes(read_recording(bag, robot), robot, Selection(idle=0))


def marked(*texts):
    """Six seconds in two episodes, 0.5 to 2.4 s and 3 to 5 s, and prompts: (seconds, words)."""
    marks = [(0.5, "one"), (2.4, ""), (3.0, "two"), (5.0, "")]
    spoken = [kit.text(at(seconds), words) for seconds, words in texts]
    return [*kit.episode(seconds=6.0), *(kit.text(at(s), words, "/episode") for s, words in marks), *spoken]


def test_a_prompt_a_moment_after_its_mark_is_that_of_the_whole_episode(tmp_path):
    one, two = cut(tmp_path, marked((0.5, "red"), (3.05, "blue")), episode_topic="/episode")
    assert (set(one.prompts), set(two.prompts)) == ({"red"}, {"blue"})


def test_a_prompt_that_changes_within_an_episode_counts_from_then_on(tmp_path):
    _, two = cut(tmp_path, marked((0.5, "red"), (4.5, "blue")), episode_topic="/episode")
    assert two.prompts == ["red"] * 15 + ["blue"] * 5
    _, two = cut(tmp_path / "again", marked((3.05, "red"), (4.5, "blue")), episode_topic="/episode")
    assert two.prompts == ["red"] * 15 + ["blue"] * 5
