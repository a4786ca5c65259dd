"""Models that answer many askers at once, token by token: vLLM, and transformers where vLLM does not run.

    engine = VllmEngine.start(directory, EngineSettings())
    async for piece in engine.answer(Ask(prompt_ids=(1, 5, 9), max_tokens=32)):
        print(piece.text)

Plain asyncio: nothing here knows of HTTP or Ray. `generation` samples whole data sets; this room serves people.
"""
