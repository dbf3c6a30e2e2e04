"""A softmax classifier, one weight per feature and class, with gradients by hand."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log

from .iris import Row


class Softmax:
    """Linear scores, softmax, cross-entropy."""

    def __init__(self, features: int, classes: int) -> None:
        self.weights = [[0.0] * (features + 1) for _ in range(classes)]
        self.zero_gradients()

    def zero_gradients(self) -> None:
        """Forget what `backward` has accumulated."""
        self.gradients = [[0.0] * len(weights) for weights in self.weights]
        self.samples = 0

    def predict(self, features: Sequence[float]) -> list[float]:
        """The probability of each class."""
        inputs = (*features, 1.0)
        scores = [sum(w * x for w, x in zip(weights, inputs)) for weights in self.weights]
        highest = max(scores)
        powers = [exp(score - highest) for score in scores]
        return [power / sum(powers) for power in powers]

    def backward(self, batch: Sequence[Row]) -> float:
        """Add the gradients of `batch` to those accumulated, and return its mean loss."""
        loss = 0.0
        for features, label in batch:
            probabilities = self.predict(features)
            loss -= log(probabilities[label])
            for number, (gradients, probability) in enumerate(zip(self.gradients, probabilities)):
                error = probability - (number == label)
                for place, x in enumerate((*features, 1.0)):
                    gradients[place] += error * x
        self.samples += len(batch)
        return loss / len(batch)

    def update(self, learning_rate: float) -> None:
        """Step along the mean of the gradients accumulated, and forget them."""
        for weights, gradients in zip(self.weights, self.gradients):
            for place, gradient in enumerate(gradients):
                weights[place] -= learning_rate * gradient / self.samples
        self.zero_gradients()

    def accuracy(self, rows: Sequence[Row]) -> float:
        """The share of `rows` whose likeliest class is the right one."""
        hits = 0
        for features, label in rows:
            probabilities = self.predict(features)
            hits += probabilities.index(max(probabilities)) == label
        return hits / len(rows)
