"""A batch gateway that speaks OpenAI's Files and Batch API and fills idle capacity of model servers."""
