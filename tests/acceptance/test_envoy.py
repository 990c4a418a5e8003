"""smoke"""
import pytest
pytestmark = pytest.mark.asyncio(loop_scope="module")
async def test_x(world):
    await world.still_serves()
