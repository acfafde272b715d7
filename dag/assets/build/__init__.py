"""Builds everything in `dag/assets` from freely licensed drawings; needed only to train these models again."""

from dag.quiet import quieten

quieten()
