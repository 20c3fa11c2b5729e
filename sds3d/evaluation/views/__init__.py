"""Grades of what a teacher that is conditioned on cameras draws: azimuths, multi-view groups, novel views."""
