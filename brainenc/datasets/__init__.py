"""Subjects as they lie on disk: stimuli, responses, ROIs; and made ones with a known answer."""
