"""CLIP-Dissect's similarities written out from the paper's formulas, one unit, word and
image at a time.
"""

import math


def p_word_given_image(P, scale):
    """softmax over the words of a P, for each image."""
    table = []
    for row in P:
        weights = [math.exp(scale * value) for value in row]
        table.append([weight / sum(weights) for weight in weights])
    return table


def ranked(values):
    return sorted(range(len(values)), key=lambda place: (-values[place], place))


def expected_p(unit, word, p, top, first, last):
    """E[p(t|B)] = product over images of 1 + p(x in B) (p(t|x) - 1)."""
    product = 1.0
    for rank, image in enumerate(ranked(unit)):
        belongs = first - (first - last) * rank / top if rank < top else 0.0
        product *= 1 + belongs * (p[image][word] - 1)
    return product


def p_of_set(unit, word, p, top):
    product = 1.0
    for image in ranked(unit)[:top]:
        product *= p[image][word]
    return product


def pmi(units, P, scale, lam, of_unit):
    """log p(t|B) - lam log p(t), p(t) the mean over units."""
    p = p_word_given_image(P, scale)
    words = range(len(P[0]))
    given = [[of_unit(unit, word, p) for word in words] for unit in units]
    prior = [sum(row[word] for row in given) / len(units) for word in words]
    return [
        [math.log(row[word]) - lam * math.log(prior[word]) for word in words]
        for row in given
    ]


def soft_wpmi(units, P, top, scale, lam, first, last):
    top = min(top, len(P))
    return pmi(
        units,
        P,
        scale,
        lam,
        lambda unit, word, p: expected_p(unit, word, p, top, first, last),
    )


def wpmi(units, P, top, scale, lam):
    return pmi(
        units, P, scale, lam, lambda unit, word, p: p_of_set(unit, word, p, top)
    )


def rank_reorder(units, P, power, share):
    scores = []
    for unit in units:
        seen = ranked(unit)[: max(1, int(share * len(unit)))]
        scores.append([])
        for word in range(len(P[0])):
            near = [P[image][word] for image in seen]
            sorted_values = sorted((unit[image] for image in seen), reverse=True)
            reordered = [0.0] * len(seen)
            for rank, place in enumerate(ranked(near)):
                reordered[place] = sorted_values[rank]
            moved = sum(
                abs(new - unit[image]) ** power
                for new, image in zip(reordered, seen, strict=True)
            )
            scores[-1].append(-(moved ** (1 / power)))
    return scores


def cosine(a, b):
    length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / length


def cos(units, P):
    return [
        [cosine(unit, [row[word] for row in P]) for word in range(len(P[0]))]
        for unit in units
    ]


def cubed(values):
    mean = sum(values) / len(values)
    return [(value - mean) ** 3 for value in values]


def cos_cubed(units, P):
    return [
        [
            cosine(cubed(unit), cubed([row[word] for row in P]))
            for word in range(len(P[0]))
        ]
        for unit in units
    ]
