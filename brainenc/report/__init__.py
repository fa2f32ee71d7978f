"""Tables, figures and pages from what a run left behind."""
