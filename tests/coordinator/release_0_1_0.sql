-- The database of a coordinator of release 0.1.0, as `sqlite3 fedge.sqlite .dump` printed it.
CREATE TABLE devices (
	name VARCHAR(63) NOT NULL, 
	first_seen_at DOUBLE NOT NULL, 
	last_seen_at DOUBLE NOT NULL, 
	boot BIGINT, 
	online BOOLEAN NOT NULL, 
	examples BIGINT, 
	version BIGINT, 
	agent_version VARCHAR(40), 
	PRIMARY KEY (name)
);
INSERT INTO "devices" VALUES('pi-1',3.0,3.0,NULL,1,NULL,NULL,NULL);
CREATE TABLE facts (
	name VARCHAR(40) NOT NULL, 
	value TEXT NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "facts" VALUES('schema_version','1');
INSERT INTO "facts" VALUES('population','kitchen');
CREATE TABLE participants (
	round BIGINT NOT NULL, 
	device VARCHAR(63) NOT NULL, 
	status VARCHAR(20) NOT NULL, 
	reason VARCHAR(40), 
	detail TEXT NOT NULL, 
	"update" TEXT, 
	examples BIGINT, 
	steps BIGINT, 
	training_s DOUBLE, 
	loss TEXT, 
	metrics JSON, 
	asked_at DOUBLE NOT NULL, 
	offered_at DOUBLE, 
	decided_at DOUBLE, 
	PRIMARY KEY (round, device), 
	FOREIGN KEY(round) REFERENCES rounds (number)
);
INSERT INTO "participants" VALUES(1,'pi-1','accepted',NULL,'','{"sha256":"2937013f2181810606b2a799b05bda2849f3e369a20982a4138f0e0a55984ce4","size_bytes":6,"chunk_bytes":61440,"chunk_digests":"KTcBPyGBgQYGsqeZsFvaKA=="}',30,4,1.5,'{"by_epoch":[0.9,0.4],"by_batch":[1.0,0.8,0.5,0.3]}','{"accuracy": 0.5}',40.0,NULL,50.0);
INSERT INTO "participants" VALUES(1,'pi-2','silent',NULL,'',NULL,NULL,NULL,NULL,NULL,NULL,40.0,NULL,60.0);
INSERT INTO "participants" VALUES(2,'pi-1','asked',NULL,'',NULL,NULL,NULL,NULL,NULL,NULL,40.0,NULL,NULL);
INSERT INTO "participants" VALUES(2,'pi-2','accepted',NULL,'','{"sha256":"16367aacb67a4a017c8da8ab95682ccb390863780f7114dda0a0e0c55644c7c4","size_bytes":6,"chunk_bytes":61440,"chunk_digests":"FjZ6rLZ6SgF8jairlWgsyw=="}',30,4,1.5,'{"by_epoch":[0.9,0.4],"by_batch":[1.0,0.8,0.5,0.3]}','{"accuracy": 0.5}',40.0,NULL,70.0);
CREATE TABLE plans (
	sha256 VARCHAR(64) NOT NULL, 
	ref TEXT NOT NULL, 
	task VARCHAR(63) NOT NULL, 
	task_fingerprint TEXT NOT NULL, 
	created_at DOUBLE NOT NULL, 
	PRIMARY KEY (sha256)
);
INSERT INTO "plans" VALUES('64879f7d6b960a01909762d911a32d4582c20010c5641ee90278b644a9e3b525','{"sha256":"64879f7d6b960a01909762d911a32d4582c20010c5641ee90278b644a9e3b525","size_bytes":4,"chunk_bytes":61440,"chunk_digests":"ZIeffWuWCgGQl2LZEaMtRQ=="}','digits','f00d',1.0);
CREATE TABLE refusals (
	round BIGINT NOT NULL, 
	device VARCHAR(63) NOT NULL, 
	reason VARCHAR(40) NOT NULL, 
	count BIGINT NOT NULL, 
	last_detail TEXT NOT NULL, 
	last_at DOUBLE NOT NULL, 
	PRIMARY KEY (round, device, reason)
);
CREATE TABLE rounds (
	number BIGINT NOT NULL, 
	base BIGINT NOT NULL, 
	phase VARCHAR(20) NOT NULL, 
	goal BIGINT NOT NULL, 
	quorum BIGINT NOT NULL, 
	seed BIGINT NOT NULL, 
	opened_at DOUBLE NOT NULL, 
	gather_until DOUBLE NOT NULL, 
	train_until DOUBLE, 
	closed_at DOUBLE, 
	outcome VARCHAR(20), 
	reason TEXT NOT NULL, 
	version BIGINT, 
	PRIMARY KEY (number), 
	CONSTRAINT closed_has_an_outcome CHECK ((phase = 'closed') = (outcome IS NOT NULL))
);
INSERT INTO "rounds" VALUES(1,0,'closed',2,1,42,10.0,40.0,640.0,60.0,'aggregated','',1);
INSERT INTO "rounds" VALUES(2,1,'training',2,1,42,10.0,40.0,640.0,NULL,NULL,'',NULL);
CREATE TABLE versions (
	number BIGINT NOT NULL, 
	plan_sha256 VARCHAR(64) NOT NULL, 
	base BIGINT, 
	round BIGINT, 
	weights TEXT NOT NULL, 
	golden TEXT NOT NULL, 
	model_sha256 VARCHAR(64) NOT NULL, 
	model_bytes BIGINT NOT NULL, 
	server_state VARCHAR(64), 
	metrics JSON NOT NULL, 
	note TEXT NOT NULL, 
	created_at DOUBLE NOT NULL, 
	PRIMARY KEY (number), 
	FOREIGN KEY(plan_sha256) REFERENCES plans (sha256), 
	UNIQUE (round)
);
INSERT INTO "versions" VALUES(0,'64879f7d6b960a01909762d911a32d4582c20010c5641ee90278b644a9e3b525',NULL,NULL,'{"sha256":"b6776a5e4ab488d8e9945941ab1495e02928868bde77e43e726cd2b48c60381b","size_bytes":9,"chunk_bytes":61440,"chunk_digests":"tndqXkq0iNjplFlBqxSV4A=="}','{"sha256":"47bebd67e55d1ee90357a5ce22b2703193035cefbc9dbec45481df664778d16f","size_bytes":8,"chunk_bytes":61440,"chunk_digests":"R769Z+VdHukDV6XOIrJwMQ=="}','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa',1234,NULL,'{"loss": 0.5, "accuracy": 0.75}','',2.0);
INSERT INTO "versions" VALUES(1,'64879f7d6b960a01909762d911a32d4582c20010c5641ee90278b644a9e3b525',0,1,'{"sha256":"3bb63c501a2cb9b43bfbf09f0b02a7f12408e1922617522b8441afd37272b915","size_bytes":9,"chunk_bytes":61440,"chunk_digests":"O7Y8UBosubQ7+/CfCwKn8Q=="}','{"sha256":"a65e708bf319065a6e3e2635aae02596bc6cce2467fe91e66b168a07a661c66d","size_bytes":8,"chunk_bytes":61440,"chunk_digests":"pl5wi/MZBlpuPiY1quAllg=="}','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa',1234,NULL,'{"loss": 0.5, "accuracy": 0.75}','',60.0);
