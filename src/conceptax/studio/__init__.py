"""A studio in a browser: draw with two models, bring a concept back, erase one, attend to less.

`jobs` runs one thing at a time and can stop it between two steps, `models` holds the models, `work`
is what is done with them, and `page` shows it. Only the page needs gradio.
"""
