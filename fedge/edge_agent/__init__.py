"""The device's room: it fetches versions, trains on its own examples and serves predictions.

The agent's main process imports neither onnxruntime nor torch: training and activation happen in
a child process (`fedge.edge_agent.trainer`), so a broken plan or a full memory cannot take the
agent down, and the memory comes back when the child ends. Examples never leave the device.
"""
