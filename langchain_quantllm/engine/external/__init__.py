"""Engines that others keep, behind the engine protocol: token ids in, token ids out."""
