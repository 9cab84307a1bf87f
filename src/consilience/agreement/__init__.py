"""Agreement of explanations: masks, overlap and its chance level, nulls, and an audit."""
