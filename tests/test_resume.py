"""What a checkpoint says about where a run stands, whichever version wrote it."""

from vitds.checkpoint import Choice
from vitds.resume import Progress


class Holding:
    """An engine whose checkpoint has this state."""

    def __init__(self, state):
        self.state = state

    def load(self, directory, tag):
        return {"vitds": self.state}


def test_bad_samples_of_older_checkpoints_count_one_each(tmp_path):
    choice = Choice(tmp_path / "global_step4")
    names = [("a.tar", "x"), ("b.tar", "y")]
    older = Progress.restore(Holding({"step": 4, "bad_samples": names}), choice)
    assert older.bad_samples == dict.fromkeys(names, 1)
    weighted = {names[0]: 1, names[1]: 500}
    assert Progress.restore(Holding({"step": 4, "bad_samples": weighted}), choice).bad_samples == weighted
