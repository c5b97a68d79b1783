// Calls a dash-llm server: health, a streamed answer, a cancelled stream, and a request that is refused.
//
//	./generate.sh && DASH_TOKEN=… go run . [host:port]
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	dashv1 "dashexample/dash_api/v1"
)

func main() {
	target := "localhost:50051"
	if len(os.Args) > 1 {
		target = os.Args[1]
	}
	if err := run(target, os.Getenv("DASH_TOKEN")); err != nil {
		printError(err)
		os.Exit(1)
	}
}

func run(target, token string) error {
	// Plaintext, for a server on this machine. For others: credentials.NewTLS(nil), of grpc/credentials.
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()

	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}

	health, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		return err
	}
	fmt.Println("health:", health.GetStatus())

	client := dashv1.NewGenerationServiceClient(conn)
	if err := streamAnswer(ctx, client); err != nil {
		return err
	}
	if err := cancelStream(ctx, client); err != nil {
		return err
	}
	return sendBadRequest(ctx, client)
}

// streamAnswer prints an answer as it comes, then the reason for its end and its speed.
func streamAnswer(ctx context.Context, client dashv1.GenerationServiceClient) error {
	stream, err := client.StreamGenerate(ctx, &dashv1.StreamGenerateRequest{
		Parameters: chat("Why is the sky blue?", 64),
	})
	if err != nil {
		return err
	}
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		switch event := response.GetEvent().(type) {
		case *dashv1.StreamGenerateResponse_Delta:
			fmt.Print(event.Delta.GetText())
		case *dashv1.StreamGenerateResponse_Finished:
			usage := event.Finished.GetUsage()
			// decode_seconds begins with the first token.
			speed := float64(usage.GetOutputTokenCount()-1) / usage.GetDecodeSeconds()
			fmt.Printf("\nfinished: %s, %.1f tokens a second\n", event.Finished.GetReason(), speed)
		}
	}
}

// cancelStream cancels a long answer after its first text. The server stops within one step.
func cancelStream(ctx context.Context, client dashv1.GenerationServiceClient) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	parameters := chat("Tell me a long story.", 1000)
	parameters.Stopping.IgnoreEos = proto.Bool(true)
	stream, err := client.StreamGenerate(ctx, &dashv1.StreamGenerateRequest{Parameters: parameters})
	if err != nil {
		return err
	}
	for {
		response, err := stream.Recv()
		if err != nil && ctx.Err() != nil {
			fmt.Println("cancelled stream:", code.Code(status.Code(err)))
			return nil
		}
		if err != nil {
			return err
		}
		if response.GetDelta() != nil {
			cancel()
		}
	}
}

// sendBadRequest prints what the server says to a temperature that does not exist.
func sendBadRequest(ctx context.Context, client dashv1.GenerationServiceClient) error {
	parameters := chat("Hello", 8)
	parameters.Sampling = &dashv1.SamplingParameters{Temperature: proto.Float32(-1)}
	_, err := client.Generate(ctx, &dashv1.GenerateRequest{Parameters: parameters})
	if err == nil {
		return errors.New("the server took a temperature of -1")
	}
	printError(err)
	return nil
}

func chat(question string, maxNewTokens int32) *dashv1.GenerationParameters {
	messages := []*dashv1.ChatMessage{{Role: "user", Content: question}}
	return &dashv1.GenerationParameters{
		Prompt:   &dashv1.GenerationParameters_Chat{Chat: &dashv1.ChatPrompt{Messages: messages}},
		Stopping: &dashv1.StoppingParameters{MaxNewTokens: proto.Int32(maxNewTokens)},
	}
}

// printError prints a status with its google.rpc details: the reason, the wrong fields, the delay before a retry.
func printError(err error) {
	failure := status.Convert(err)
	fmt.Printf("%s: %s\n", code.Code(failure.Code()), failure.Message())
	for _, detail := range failure.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			fmt.Println("  reason:", detail.GetReason())
		case *errdetails.BadRequest:
			for _, violation := range detail.GetFieldViolations() {
				fmt.Printf("  field: %s: %s\n", violation.GetField(), violation.GetDescription())
			}
		case *errdetails.RetryInfo:
			fmt.Printf("  retry after: %.3f s\n", detail.GetRetryDelay().AsDuration().Seconds())
		}
	}
}
