package main

import "strings"

// modelCase is one run of spin.
type modelCase struct {
	model   string // file name without .pml
	what    string // of a sound model: what is in it
	defines string
	without string // the rule that a variant leaves out; "": sound
	live    bool   // the property is that something happens, not that nothing bad does
}

func (c modelCase) variant() string {
	if c.without != "" {
		return "-D" + c.without
	}
	return c.what
}

func (c modelCase) name() string { return c.model + ": " + c.variant() }

// cases are all runs. A variant has the smallest model that shows its violation, so
// that the trail is short.
var cases = []modelCase{
	{model: "hints", what: "4 pages, hints, 2 ids", defines: "-DPAGES=4 -DHINTS"},
	{model: "hints", what: "4 pages, I/O, holes", defines: "-DPAGES=4 -DIO"},
	{model: "hints", what: "2 pages, hints, I/O, holes", defines: "-DPAGES=2 -DHINTS -DIO -DONE_ID"},
	{model: "hints", what: "2 pages, an earlier migration's hints", defines: "-DPAGES=2 -DHINTS -DEARLIER"},
	{model: "hints", what: "2 pages, hints, GET clears", defines: "-DPAGES=2 -DHINTS -DGETCLEARS"},
	{model: "hints", what: "4 pages, I/O, holes, GET clears", defines: "-DPAGES=4 -DIO -DGETCLEARS"},
	{model: "handoff", what: "never two"},
	{model: "handoff", what: "never none", live: true},
	{model: "handoff", what: "never two, a stop is undone", defines: "-DONCE=1 -DSTOPS=2"},
	{model: "handoff", what: "never none, a stop is undone", defines: "-DONCE=1 -DSTOPS=2", live: true},
	{model: "disks", what: "no block is lost"},
	{model: "handoff", what: "never two, memory comes later", defines: "-DPOSTCOPY -DONCE=1"},
	{model: "handoff", what: "never none, memory comes later", defines: "-DPOSTCOPY -DONCE=1", live: true},
	{model: "missing", what: "a stop is undone", defines: "-DUNDO"},
	{model: "missing", what: "connections are lost, the collector runs", defines: "-DLOSS -DGC"},
	{model: "missing", what: "a page that was hinted", defines: "-DHINTED -DUNDO -DLOSS -DGC"},
	{model: "missing", what: "huge pages, a stop is undone", defines: "-DHUGE -DUNDO"},
	{model: "missing", what: "huge pages, connections are lost", defines: "-DHUGE -DLOSS"},

	{model: "hints", without: "NO_R1", defines: "-DPAGES=2"},
	{model: "hints", without: "NO_R1_RETURN", defines: "-DPAGES=2"},
	{model: "hints", without: "NO_R1_HOLE", defines: "-DPAGES=2 -DIO"},
	{model: "hints", without: "NO_R2", defines: "-DPAGES=2"},
	{model: "hints", without: "NO_R2_TWICE", defines: "-DPAGES=2"},
	{model: "hints", without: "NO_R3", defines: "-DPAGES=2 -DHINTS -DQUEUE=2"},
	{model: "hints", without: "NO_R3_SINCE", defines: "-DPAGES=2 -DHINTS -DQUEUE=2"},
	{model: "hints", without: "NO_R3_ARM", defines: "-DPAGES=2 -DHINTS -DQUEUE=2"},
	{model: "hints", without: "NO_R3_CLEAR", defines: "-DPAGES=2 -DHINTS -DQUEUE=2"},
	{model: "hints", without: "NO_R3_DANCE", defines: "-DPAGES=2 -DHINTS -DQUEUE=3"},
	{model: "hints", without: "NO_R3_DRAIN", defines: "-DPAGES=2 -DHINTS -DQUEUE=3 -DEARLIER -DONE_ID"},
	{model: "hints", without: "NO_R4", defines: "-DPAGES=2"},
	{model: "hints", without: "NO_R4_LATE", defines: "-DPAGES=2"},
	{model: "hints", without: "NO_R5", defines: "-DPAGES=2 -DIO"},
	{model: "hints", without: "NO_R5_DRAIN", defines: "-DPAGES=2 -DIO"},
	{model: "hints", without: "NO_R5_SYNC", defines: "-DPAGES=2"},
	{model: "hints", without: "NO_R6", defines: "-DPAGES=2 -DIO"},
	{model: "hints", without: "NO_R6_MARK", defines: "-DPAGES=2 -DIO"},
	{model: "hints", without: "NO_R6_ZERO", defines: "-DPAGES=2 -DIO"},

	{model: "disks", without: "EARLY_RECORD"},
	{model: "disks", without: "EARLY_TOLD"},
	{model: "disks", without: "NO_RECORD_OF_ZERO"},
	{model: "disks", without: "NO_R1"},
	{model: "disks", without: "NO_R4"},
	{model: "disks", without: "NO_R5"},
	{model: "disks", without: "NO_R5_SYNC"},
	{model: "disks", without: "NO_R6"},
	{model: "disks", without: "NO_R6_MARK"},
	{model: "disks", without: "NO_BARRIER"},
	{model: "handoff", without: "NO_REFUSAL", defines: "-DPOSTCOPY -DONCE=1"},
	{model: "handoff", without: "NO_RECOVERY", defines: "-DPOSTCOPY -DONCE=1", live: true},
	{model: "missing", without: "NO_R7", defines: "-DUNDO"},
	{model: "missing", without: "NO_R7_BARRIER", defines: "-DUNDO"},
	{model: "missing", without: "NO_R7_UNDO", defines: "-DUNDO"},
	{model: "missing", without: "NO_R8"},
	{model: "missing", without: "NO_R8_CLAIM"},
	{model: "missing", without: "NO_R8_CLAIM", defines: "-DHUGE"},
	{model: "missing", without: "NO_R8_HIDDEN", defines: "-DHUGE"},
	{model: "missing", without: "NO_R9", defines: "-DLOSS"},
	{model: "missing", without: "NO_R10", defines: "-DGC"},

	{model: "handoff", without: "NO_STOP"},
	{model: "handoff", without: "NO_STOP_NUMBER", defines: "-DONCE=1 -DSTOPS=2"},
	{model: "handoff", without: "NO_WAIT"},
	{model: "handoff", without: "NO_EXCLUSION"},
	{model: "handoff", without: "NO_IRREVERSIBLE"},
	{model: "handoff", without: "NO_UNKNOWN"},
	{model: "handoff", without: "NO_FINAL"},
	{model: "handoff", without: "NO_VERDICT_FIRST"},
	{model: "handoff", without: "NO_NONCE"},
	{model: "handoff", without: "FORCE"},
	{model: "handoff", without: "NO_ASKING", live: true},
	{model: "handoff", without: "NO_MEMORY", live: true},
	{model: "handoff", without: "NO_PATIENCE_LIMIT", live: true},
}

// spinArgs are the definitions that spin's preprocessor gets.
func (c modelCase) spinArgs() []string {
	args := strings.Fields(c.defines)
	if c.without != "" {
		args = append(args, "-D"+c.without)
	}
	if c.live {
		args = append(args, "-DLIVE")
	}
	return args
}

// ccArgs select the search. A variant is searched breadth first, for the shortest
// trail; spin cannot do that for a liveness property.
func (c modelCase) ccArgs() []string {
	args := []string{"-w", "-DCOLLAPSE", "-DMEMLIM=5000"}
	switch {
	case c.live:
		args = append(args, "-DNFAIR=3")
	case c.without != "":
		args = append(args, "-DSAFETY", "-DBFS")
	default:
		args = append(args, "-DSAFETY")
	}
	if c.without != "" {
		return append(args, "-O1") // most of its time is the compiler's
	}
	return append(args, "-O2")
}

func (c modelCase) panArgs() []string {
	switch {
	case c.live:
		return []string{"-a", "-f", "-m2000000"}
	case c.without != "":
		return []string{"-w20"} // a small table is set up sooner
	}
	return []string{"-m2000000"}
}
