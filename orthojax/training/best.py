"""Which step of a run was the best on the validation split, as every later checkpoint says."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Best:
    """The best evaluation on the validation split so far.

    It is in every checkpoint, so that a resumed run, on whatever processes, chooses and stops as an
    undisturbed one.

    Attributes:
      step: of the evaluation.
      accuracy: on the validation split; later ones that only equal it are not better.
      recalibrate_bn: that it was made with. Accuracies of another value are not comparable: the
        first evaluation with another one is the best of those that follow.
      since: evaluations after it, none of them better.
    """

    step: int
    accuracy: float
    recalibrate_bn: int
    since: int = 0

    def after(self, found: "Best") -> "Best":
        """The best when one more evaluation has been made.

        Example:
          >>> best = Best(10, 0.8, 0)
          >>> best.after(Best(20, 0.8, 0))
          Best(step=10, accuracy=0.8, recalibrate_bn=0, since=1)
          >>> best.after(Best(20, 0.7, recalibrate_bn=1280)).step
          20
        """
        if found.accuracy > self.accuracy or found.recalibrate_bn != self.recalibrate_bn:
            return found
        return dataclasses.replace(self, since=self.since + 1)

    def exhausts(self, patience: int | None, recalibrate_bn: int) -> bool:
        """Whether `patience` evaluations after it, made with this value, were not better."""
        comparable = self.recalibrate_bn == recalibrate_bn
        return patience is not None and comparable and self.since >= patience
