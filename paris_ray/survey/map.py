"""A map of features in two dimensions, coloured by cluster."""

import numpy as np
from numpy.typing import NDArray

SIDE, MARGIN, DOT = 400, 12, 2.2  # of the drawing, in its own units
OUTLIERS = 0.5  # percent at each end that are drawn at the edge


def principal_plane(features: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return features `(N, D)` along their first two principal directions, `(N, 2)`.

    The sign of a direction is that of its largest component, so that equal features have an equal
    map.
    """
    centred = (features - features.mean(axis=0)).astype(np.float64)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    directions = vectors[:, ::-1][:, :2]
    largest = np.abs(directions).argmax(axis=0)
    signs = np.sign(directions[largest, np.arange(directions.shape[1])])
    plane = np.zeros((len(features), 2))
    plane[:, : directions.shape[1]] = centred @ (directions * signs)
    return plane


def colour(cluster: int, num_clusters: int) -> str:
    """Return the colour of a cluster, for light and dark backgrounds alike."""
    lightness = (52, 40, 66)[cluster % 3]
    return f"hsl({round(360 * cluster / num_clusters)} 65% {lightness}%)"


def drawn_map(features: NDArray[np.float32], clusters: NDArray[np.int64], num_clusters: int) -> str:
    """Return a map as SVG, with every cluster's number at the middle of its points.

    Args:
        features: `(N, D)`, N at least 1.
        clusters: The cluster `(N,)` of each.
        num_clusters: How many there are.
    """
    plane = principal_plane(features)
    low, high = np.percentile(plane, (OUTLIERS, 100 - OUTLIERS), axis=0)
    scaled = np.clip((plane - low) / np.maximum(high - low, 1e-12), 0, 1)
    points = MARGIN + scaled * (SIDE - 2 * MARGIN)
    groups, labels = [], []
    for k in np.unique(clusters):
        inside = points[clusters == k]
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{DOT}"/>' for x, y in inside)
        groups.append(f'<g fill="{colour(int(k), num_clusters)}" fill-opacity=".7">{dots}</g>')
        x, y = np.median(inside, axis=0)
        labels.append(f'<text x="{x:.1f}" y="{y:.1f}">{k}</text>')
    text = 'fill="currentColor" font-size="14" font-weight="bold" text-anchor="middle"'
    return (
        f'<svg viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="map of the features">'
        f"{''.join(groups)}<g {text}>{''.join(labels)}</g></svg>"
    )
