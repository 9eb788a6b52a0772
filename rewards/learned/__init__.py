"""Rewards with published weights: HPSv2, ImageReward, PickScore, CLIP score, LAION's aesthetic predictor."""
