"""Report: saved TokenScores → quadrants, the TIP map, tables. Needs no GPU and no model."""
