"""The schema's history, applied by ``batchgw.store.migrate`` when a store is opened."""
