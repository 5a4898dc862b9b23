// Command client drives a VM with a client that oapi-codegen makes of docs/openapi.json: it
// shares nothing with govmm but that document. It is a module of its own, so that who uses
// govmm needs neither the generator nor its runtime.
//
//	go tool oapi-codegen -config oapi-codegen.yaml ../../docs/openapi.json
//	go run . SOCKET ADDRESS
//
// SOCKET is the API socket of a VM that runs, ADDRESS that of a receiver. The VM is described,
// paused, resumed and migrated, and each step is a line.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "client: expected SOCKET and ADDRESS")
		os.Exit(2)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if err := drive(ctx, os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "client:", err)
		os.Exit(1)
	}
}

// open returns a client for the VM at a socket. Each request has a connection of its own, since
// a VM whose guest has moved away does not wait for idle ones.
func open(socket string) (*ClientWithResponses, error) {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}
	return NewClientWithResponses("http://vm", WithHTTPClient(&http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}))
}

func drive(ctx context.Context, socket, address string) error {
	c, err := open(socket)
	if err != nil {
		return err
	}
	info, err := c.GetInfoWithResponse(ctx)
	if err != nil {
		return err
	}
	if info.JSON200 == nil {
		return refused("info", info.HTTPResponse, info.ApplicationproblemJSONDefault)
	}
	vm := info.JSON200
	fmt.Printf("info: %s is %s, %d vCPUs, %d bytes, %d disks\n", vm.Name, vm.State, vm.Cpus, vm.Memory, len(*vm.Devices.Disks))

	paused, err := c.PauseWithResponse(ctx, PauseJSONRequestBody{})
	if err != nil {
		return err
	}
	if paused.JSON200 == nil {
		return refused("pause", paused.HTTPResponse, paused.ApplicationproblemJSONDefault)
	}
	fmt.Println("pause:", paused.JSON200.State)
	resumed, err := c.ResumeWithResponse(ctx, ResumeJSONRequestBody{})
	if err != nil {
		return err
	}
	if resumed.JSON200 == nil {
		return refused("resume", resumed.HTTPResponse, resumed.ApplicationproblemJSONDefault)
	}
	fmt.Println("resume:", resumed.JSON200.State)

	// What is wrong is a problem with its words.
	wrong, err := c.StartMigrationWithResponse(ctx, nil, MigrateRequest{To: "nowhere"})
	if err != nil {
		return err
	}
	if p := wrong.ApplicationproblemJSON400; p == nil || p.Detail == nil {
		return fmt.Errorf("a migration to nowhere: expected a problem, found %s", wrong.Status())
	}
	fmt.Println("problem:", *wrong.ApplicationproblemJSON400.Detail)
	return migrate(ctx, c, address)
}

// migrate starts a migration with an id and follows the VM's events to its end.
func migrate(ctx context.Context, c *ClientWithResponses, address string) error {
	follow := true
	events, err := c.GetEvents(ctx, &GetEventsParams{Follow: &follow})
	if err != nil {
		return err
	}
	defer events.Body.Close()
	id, limit := "generated", int64(50<<20)
	started, err := c.StartMigrationWithResponse(ctx, nil, MigrateRequest{To: address, Id: &id, BandwidthLimit: &limit})
	if err != nil {
		return err
	}
	if started.JSON202 == nil {
		return refused("migrate", started.HTTPResponse, started.ApplicationproblemJSON409)
	}
	progress, err := c.FollowMigration(ctx)
	if err != nil {
		return err
	}
	defer progress.Body.Close()
	record, err := c.GetMigrationRecordWithResponse(ctx, id)
	if err != nil {
		return err
	}
	if record.JSON200 == nil {
		return refused("record", record.HTTPResponse, record.ApplicationproblemJSONDefault)
	}
	fmt.Printf("record: %s of %s to %s, by %s\n", record.JSON200.Id, record.JSON200.Vm, record.JSON200.Address, record.JSON200.Trigger)

	last := int64(0)
	for lines := bufio.NewScanner(events.Body); lines.Scan(); {
		var e VMEvent
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return fmt.Errorf("event %q: %w", lines.Text(), err)
		}
		if e.Seq != last+1 {
			return fmt.Errorf("event %d follows %d", e.Seq, last)
		}
		last = e.Seq
		switch {
		case e.Type == "state" && e.State != nil:
			fmt.Println("event: state", *e.State)
		case e.Type == "migration" && e.Phase != nil:
			fmt.Println("event: phase", *e.Phase)
			if *e.Phase == "completed" || *e.Phase == "failed" || *e.Phase == "cancelled" {
				return end(progress)
			}
		case e.Type == "round" && e.Round != nil:
			fmt.Printf("event: round %d sent %d pages\n", e.Round.N, e.Round.PagesSent)
		}
	}
	return errors.New("the events have ended before the migration")
}

// end reads the migration's own stream to its last line, which has the result: the process of
// a VM whose guest has moved away does not end before it is read.
func end(progress *http.Response) error {
	var last Event
	for lines := bufio.NewScanner(progress.Body); lines.Scan(); {
		last = Event{}
		if err := json.Unmarshal(lines.Bytes(), &last); err != nil {
			return fmt.Errorf("progress %q: %w", lines.Text(), err)
		}
	}
	r := last.Result
	if r == nil {
		return errors.New("the progress has ended without a result")
	}
	fmt.Printf("result: %s, %d rounds, %d bytes, downtime %.1f ms\n", r.Status, len(*r.Rounds), r.BytesSent, r.DowntimeMs)
	if r.Status != "completed" {
		return errors.New(r.Error)
	}
	return nil
}

// refused is the error of an answer that is none.
func refused(what string, resp *http.Response, p *Problem) error {
	if p != nil && p.Detail != nil {
		return fmt.Errorf("%s: %s: %s", what, resp.Status, *p.Detail)
	}
	return fmt.Errorf("%s: %s", what, resp.Status)
}
