"""A closed-form network that reads the start of an interval, for the methods that train such students."""

from distill.core.noise import NoiseSchedule
from distill.core.teacher import Denoiser


class IntervalNetwork(Denoiser):
    """Predicts the flow; its subclasses say by what formula. The options are the methods' defaults."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__(None, schedule, "flow_prediction")

    def trainable_copy(self) -> Denoiser:
        return self

    def limit_time_frequency(self, highest: float) -> None:
        assert highest == 0.01

    def add_interval_start(self, features: int) -> None:
        assert features == 4
