"""Proxies: statistics of layers, curvature, saliency, hand-made proxies, and ranking statistics."""
