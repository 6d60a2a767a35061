"""The losses in float64 NumPy, one pair at a time, straight from the formulas."""

from __future__ import annotations

import numpy as np


def score_distillation(queries, documents, teacher, *, temperature, teacher_temperature, valid):
    """Mean over queries of −Σ_j p_j log q_j over the documents that count, the answer first.

    A query whose answer does not count, or none of its other documents, is left out.
    """
    losses = []
    for query, of_query, scores, counted in zip(queries, documents, teacher, valid, strict=True):
        counted = counted & ~np.isnan(scores)
        if not counted[0] or counted.sum() < 2:
            continue
        target = np.exp(scores[counted] / teacher_temperature)
        found = np.exp(of_query[counted] @ query / temperature)
        losses.append(-np.sum(target / target.sum() * np.log(found / found.sum())))
    return float(np.mean(losses)) if losses else 0.0


def similarity_distillation(queries, candidates, *, temperature, valid):
    """Mean over valid queries of Σ_j p_j (log p_j − log q_j), teacher p and student q.

    Queries and candidates are those of the student and of the teacher.
    """

    def softmax(query, vectors):
        logits = np.exp(vectors[valid] @ query / temperature)
        return logits / logits.sum()

    losses = []
    for i in np.flatnonzero(valid):
        found, wanted = (
            softmax(of_queries[i], of_pool)
            for of_queries, of_pool in zip(queries, candidates, strict=True)
        )
        losses.append(np.sum(wanted * np.log(wanted / found)))
    return float(np.mean(losses))


def contrastive(
    queries,
    candidates,
    *,
    modality,
    tau_norm,
    tau_hard,
    relative=False,
    same_modality_only=False,
    valid=None,
    document=None,
    negatives=None,
    mask_margin=np.inf,
):
    """Mean over valid i of −log softmax_j (s_ij / T_ij)[i], over the j that count."""
    n = len(queries)
    valid = np.ones(n, bool) if valid is None else valid
    keys, kinds, counts = candidates, modality, valid
    documents = None if document is None else list(document)
    if negatives is not None:
        vectors, kind, of_document, counted = negatives
        keys = np.concatenate([candidates, vectors])
        kinds = np.concatenate([modality, kind])
        counts = np.concatenate([valid, counted])
        documents = None if document is None else [*document, *of_document]
    losses = []
    for i in range(n):
        if not valid[i]:
            continue
        own = float(queries[i] @ keys[i])
        logits = {}
        for j in range(len(keys)):
            counted = counts[j]
            counted &= not (same_modality_only and kinds[j] != kinds[i])
            counted &= documents is None or documents[j] != documents[i]
            score = float(queries[i] @ keys[j])
            counted &= score <= own + mask_margin
            if j != i and not counted:
                continue
            temperature = tau_hard if kinds[j] == kinds[i] else tau_norm
            logits[j] = ((score - own) if relative else score) / temperature
        most = max(logits.values())
        total = sum(np.exp(logit - most) for logit in logits.values())
        losses.append(most + np.log(total) - logits[i])
    return float(np.mean(losses)) if losses else 0.0
