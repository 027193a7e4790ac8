import pytest

from vitds.duration import steps_for_epochs


@pytest.mark.parametrize(
    ("epochs", "num_samples", "global_batch", "steps"),
    [
        (1, 50_000, 512, 98),
        (3, 50_000, 500, 300),
        (1, 10, 64, 1),
        (0.1, 1000, 10, 10),
        (1.1, 1000, 100, 11),
        (7, 1281167, 512, 17516),
    ],
)
def test_epochs_are_rounded_up_to_a_whole_step(epochs, num_samples, global_batch, steps):
    assert steps_for_epochs(epochs, num_samples, global_batch) == steps
