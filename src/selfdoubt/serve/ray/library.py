"""Imports Ray and Ray Serve, or raises an error that names the extra to install."""

from __future__ import annotations

from selfdoubt.errors import require

ray = require("ray", "ray")
ray_serve = require("ray.serve", "ray")
