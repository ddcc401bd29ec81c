"""A yard as a whole: its processes on this machine, and the machines that have joined it."""
