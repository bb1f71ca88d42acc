"""A plan for people: tables, the timeline, the HTML page, the reasons of a choice."""
