"""What is known of each class after an evaluation: which was taken for which, as far as it is kept.

It grows with the mistakes that were made, not with the square of the classes: of more than WHOLE
classes only the cells that are not zero are kept, of more than MOST no cells but each class's sums.
"""

WHOLE, MOST = 100, 2000


def dense(confusion: list[list[int]] | dict) -> list[list[int]]:
    """A confusion matrix, rows: the true class, from either form in which it is kept."""
    if isinstance(confusion, list):
        return confusion
    size = confusion["classes"]
    matrix = [[0] * size for _ in range(size)]
    for cell, count in zip(confusion["cells"], confusion["counts"], strict=True):
        matrix[cell // size][cell % size] = count
    return matrix


def precisions(results: dict) -> tuple[list[float], list[float]]:
    """Precision and F1 of each class that has images; 0 where nothing was taken for it."""
    images, answers, right = totals(results)
    there = [c for c in zip(images, answers, right, strict=True) if c[0]]
    precision = [hits / max(1, answered) for _, answered, hits in there]
    return precision, [2 * hits / (count + answered) for count, answered, hits in there]


def totals(results: dict) -> tuple[list[int], list[int], list[int]]:
    """Of each class the images, the answers and the right answers; empty where nobody counted."""
    if "per_class" in results:
        counted = results["per_class"]
        return counted["images"], counted["answers"], counted["right"]
    confusion = results.get("confusion", [])
    if isinstance(confusion, list):
        answers = [sum(column) for column in zip(*confusion, strict=True)]
        right = [row[label] for label, row in enumerate(confusion)]
        return [sum(row) for row in confusion], answers, right
    size = confusion["classes"]
    images, answers, right = [0] * size, [0] * size, [0] * size
    for cell, count in zip(confusion["cells"], confusion["counts"], strict=True):
        label, answer = divmod(cell, size)
        images[label] += count
        answers[answer] += count
        right[label] += count * (label == answer)
    return images, answers, right
